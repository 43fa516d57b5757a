import { readFileSync } from "node:fs";
import { defineConfig } from "vite";
import { licences } from "./licences.js";

const ORT = "node_modules/onnxruntime-web/dist/";
// What the page loads of ONNX Runtime: the CPU build alone, with threads, as its own files beside the page's.
const ORT_FILES = ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"];

const besides = {
  name: "files-beside-the-page",
  generateBundle(_options, bundle) {
    // Decoders of Zarr, a format that the page never opens; the viewer would load them at the first Zarr image.
    for (const name of Object.keys(bundle)) if (/assets\/(blosc|lz4|zstd)-/.test(name)) delete bundle[name];
    for (const name of ORT_FILES) {
      this.emitFile({ type: "asset", fileName: `ort/${name}`, source: readFileSync(ORT + name) });
    }
    this.emitFile({ type: "asset", fileName: "licenses.txt", source: licences() });
  },
};

export default defineConfig({
  base: "./",
  plugins: [besides],
  worker: { format: "es" },
  build: {
    outDir: "../src/autosam3d/web_app",
    emptyOutDir: true,
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    chunkSizeWarningLimit: 4000,
    target: "es2022",
  },
});
