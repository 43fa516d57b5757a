/**
 * The graphics card, in a worker of its own: ONNX Runtime on WebGPU.
 *
 * ONNX Runtime 1.30 blocks its thread for good when it runs on a device that is lost, so whoever asks this worker
 * (`graphics.ts`) watches the clock and ends it.
 */
import type { ModelDescription } from "./core/model.ts";
import { openNetwork, type Network } from "./runtime.ts";

export type GraphicsOrder =
  | { type: "load"; base: string; onnx: Uint8Array; description: ModelDescription }
  | { type: "run"; window: Float32Array; withLogits: boolean };
export type GraphicsReport =
  | { type: "ready" }
  | { type: "answer"; logits: Float32Array; probs: Float32Array }
  | { type: "fault"; text: string };

/** What is used of WebGPU here. */
interface Device extends EventTarget {
  lost: Promise<{ reason: string }>;
}

let network: Network | null = null;
let fault: string | null = null;

self.onmessage = ({ data }: MessageEvent<GraphicsOrder>) => {
  const work = data.type === "load" ? load(data) : run(data);
  work.catch((error: unknown) => fail(error instanceof Error ? error.message.split("\n")[0]! : String(error)));
};

function say(report: GraphicsReport, transfer: Transferable[] = []) {
  self.postMessage(report, { transfer });
}

function fail(text: string) {
  fault ??= text.slice(0, 200);
  say({ type: "fault", text: fault });
}

async function load({ base, onnx, description }: Extract<GraphicsOrder, { type: "load" }>) {
  // One thread: what is heavy runs on the card.
  const opened = await openNetwork(`${base}webgpu/`, "ort.webgpu.min.mjs", "webgpu", 1, onnx, description);
  const device = (await opened.ort.env.webgpu.device) as unknown as Device;
  void device.lost.then(({ reason }) => fail(`the browser lost the graphics card (${reason})`));
  device.addEventListener("uncapturederror", (event) =>
    fail((event as Event & { error?: Error }).error?.message.split("\n")[0] ?? "an error of the graphics card"));
  network = opened.network;
  say({ type: "ready" });
}

async function run({ window, withLogits }: Extract<GraphicsOrder, { type: "run" }>) {
  // Faults of the device are tasks of their own; one that is on its way counts.
  const faultsCame = () => new Promise((resolve) => setTimeout(resolve));
  await faultsCame();
  if (fault !== null) return;
  const { probs, logits } = await network!(window, withLogits);
  await faultsCame();
  if (fault === null) say({ type: "answer", probs, logits }, [probs.buffer, logits.buffer]);
}
