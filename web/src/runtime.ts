/** ONNX Runtime in a worker: the exported graph on WebAssembly, a window in, probabilities out. */
import type * as Ort from "onnxruntime-web/wasm";
import { AppError } from "./core/errors.ts";
import type { ModelDescription } from "./core/model.ts";
import type { Predict } from "./core/segment.ts";

/** More threads than this share one window with little gain, and phones get hot. */
const MAX_THREADS = 8;

export interface Model {
  description: ModelDescription;
  /** SHA-256 that model.json names for model.onnx. */
  sha256: string;
}

export function threadCount(): number {
  return self.crossOriginIsolated ? Math.min(MAX_THREADS, Math.max(1, navigator.hardwareConcurrency || 1)) : 1;
}

/** The network, ready to run. */
export async function loadPredictor(base: string, model: Model): Promise<Predict> {
  const onnx = await fetchedOnnx(base, model.sha256);
  const ort = (await import(/* @vite-ignore */ `${base}ort/ort.wasm.min.mjs`)) as typeof Ort;
  ort.env.wasm.wasmPaths = `${base}ort/`;
  ort.env.wasm.numThreads = threadCount();
  ort.env.logLevel = "error";
  let session: Ort.InferenceSession;
  try {
    session = await ort.InferenceSession.create(onnx, { executionProviders: ["wasm"], graphOptimizationLevel: "all" });
  } catch (error) {
    throw explained(error, "the browser does not take the network");
  }
  const { patch, numOutputs } = model.description;
  const size = numOutputs * patch[0] * patch[1] * patch[2];
  return async (window) => {
    try {
      const ct = new ort.Tensor("float32", window, [1, 1, ...patch]);
      const { probs } = await session.run({ ct }, ["probs"]);
      const values = probs?.data;
      if (values instanceof Float32Array && values.length === size) return values;
    } catch (error) {
      throw explained(error, "the network failed on a window");
    }
    throw new AppError("MISMATCH", "model.onnx", "its output is not what model.json says", "export the model again");
  };
}

async function fetchedOnnx(base: string, sha256: string): Promise<Uint8Array> {
  const response = await fetch(`${base}model/model.onnx`).catch(() => null);
  if (!response?.ok) throw new AppError("NO_MODEL", "model.onnx", "it cannot be loaded", "check the web folder");
  const onnx = new Uint8Array(await response.arrayBuffer());
  // Browsers hash in secure contexts only; elsewhere there are no threads either, and the page says so.
  if (self.crypto?.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", onnx));
    const text = Array.from(digest, (b) => b.toString(16).padStart(2, "0")).join("");
    if (text !== sha256) {
      throw new AppError("HASH", "model.onnx", "its SHA-256 is not the one that model.json names",
        "copy the web folder again");
    }
  }
  return onnx;
}

function explained(error: unknown, fault: string): AppError {
  const text = error instanceof Error ? error.message : String(error);
  if (/bad_alloc|memory|allocat|out of bounds/i.test(text)) {
    return new AppError("MEMORY", "model.onnx", "this device's memory is too small for the network",
      "close other tabs, or use a machine with more memory");
  }
  return new AppError("RUNTIME", "model.onnx", `${fault} (${text.split("\n")[0]!.slice(0, 200)})`,
    "export the model again, or try another browser");
}
