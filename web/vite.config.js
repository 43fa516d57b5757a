import { readFileSync } from "node:fs";
import { defineConfig } from "vite";
import { licences } from "./licences.js";

const ORT = "node_modules/onnxruntime-web/dist/";
// What the page loads of ONNX Runtime, as its own files beside the page's: the CPU build with threads at every scan, the
// build for WebGPU only where a person asks for the graphics card. `export/web.py` knows the second folder.
const ORT_FILES = {
  ort: ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"],
  webgpu: ["ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"],
};

const besides = {
  name: "files-beside-the-page",
  generateBundle(_options, bundle) {
    // Decoders of Zarr, a format that the page never opens; the viewer would load them at the first Zarr image.
    for (const name of Object.keys(bundle)) if (/assets\/(blosc|lz4|zstd)-/.test(name)) delete bundle[name];
    for (const [folder, names] of Object.entries(ORT_FILES)) {
      for (const name of names) {
        this.emitFile({ type: "asset", fileName: `${folder}/${name}`, source: readFileSync(ORT + name) });
      }
    }
    this.emitFile({ type: "asset", fileName: "codecs/openjpeg.wasm",
      source: readFileSync("node_modules/@cornerstonejs/codec-openjpeg/dist/openjpegwasm_decode.wasm") });
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
