/** ONNX Runtime in a worker: the exported graph on WebAssembly or WebGPU, a window in, probabilities out. */
import type * as Ort from "onnxruntime-web/webgpu";
import { AppError } from "./core/errors.ts";
import type { ModelDescription } from "./core/model.ts";
import type { Answer } from "./core/parity.ts";

/** More threads than this share one window with little gain, and phones get hot. */
const MAX_THREADS = 8;
/** Windows of more voxels, 64^3, run the graph as it is. What ONNX Runtime works out beforehand stays in memory: at 96^3
 * 623 MB, without it 452 MB, for 4 % of the time. At 32 x 64 x 64 there is room, and it would be 11 %.
 * Source: benchmarks/results/web.md. */
const MANY_VOXELS = 1 << 18;

export interface Model {
  description: ModelDescription;
  /** SHA-256 that model.json names for model.onnx. */
  sha256: string;
}

/** One window [D, H, W] to its probabilities, and to its logits where they are asked for. */
export type Network = (window: Float32Array, withLogits?: boolean) => Promise<Answer>;

export function threadCount(): number {
  return self.crossOriginIsolated ? Math.min(MAX_THREADS, Math.max(1, navigator.hardwareConcurrency || 1)) : 1;
}

/** The network on WebAssembly, ready to run. */
export async function loadNetwork(base: string, onnx: Uint8Array, description: ModelDescription): Promise<Network> {
  return (await openNetwork(`${base}ort/`, "ort.wasm.min.mjs", "wasm", threadCount(), onnx, description)).network;
}

/** The network on any of ONNX Runtime's providers, and the runtime that has it. */
export async function openNetwork(folder: string, script: string, provider: "wasm" | "webgpu", threads: number,
  onnx: Uint8Array, { patch, numOutputs }: ModelDescription): Promise<{ network: Network; ort: typeof Ort }> {
  const ort = (await import(/* @vite-ignore */ folder + script)) as typeof Ort;
  ort.env.wasm.wasmPaths = folder;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  const graphOptimizationLevel =
    provider === "wasm" && patch[0] * patch[1] * patch[2] > MANY_VOXELS ? "disabled" : "all";
  let session: Ort.InferenceSession;
  try {
    session = await ort.InferenceSession.create(onnx, { executionProviders: [provider], graphOptimizationLevel });
  } catch (error) {
    throw explained(error, "the browser does not take the network");
  }
  const size = numOutputs * patch[0] * patch[1] * patch[2];
  const network: Network = async (window, withLogits = false) => {
    try {
      const ct = new ort.Tensor("float32", window, [1, 1, ...patch]);
      const { probs, logits } = await session.run({ ct }, withLogits ? ["probs", "logits"] : ["probs"]);
      const found = [probs?.data, withLogits ? logits?.data : new Float32Array(size)];
      if (found.every((values) => values instanceof Float32Array && values.length === size)) {
        return { probs: found[0] as Float32Array, logits: withLogits ? found[1] as Float32Array : new Float32Array(0) };
      }
    } catch (error) {
      throw explained(error, "the network failed on a window");
    }
    throw new AppError("MISMATCH", "model.onnx", "its output is not what model.json says", "export the model again");
  };
  return { network, ort };
}

export async function fetchedOnnx(base: string, sha256: string): Promise<Uint8Array> {
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
