/** The graphics card as a runtime that has to prove itself: on one window before the scan, and on the same behind it. */
import type { ModelDescription } from "./core/model.ts";
import { areProbabilities, parityFaults, type Answer } from "./core/parity.ts";
import type { GraphicsOrder, GraphicsReport } from "./graphicsWorker.ts";
import type { Network } from "./runtime.ts";

/** To load the runtime and to compile the network. */
const LOAD_MS = 120_000;
/** An answer may take this long, and ten times what WebAssembly took: past that the card is of no use, or lost. */
const ANSWER_MS = 30_000;
const ANSWER_TIMES = 10;

/** Why the card is not used, as a clause. */
export class GraphicsFault extends Error {}

export class Graphics {
  /** Of one window on WebAssembly. */
  readonly referenceSeconds: number;
  private readonly spent: number[] = [];
  private answerMs = ANSWER_MS;
  private fault: GraphicsFault | null = null;
  private waiting: { resolve: (report: GraphicsReport) => void; reject: (fault: GraphicsFault) => void } | null = null;

  private constructor(private readonly worker: Worker, private readonly description: ModelDescription,
    private readonly probe: Float32Array, private readonly truth: Answer, referenceMs: number) {
    this.referenceSeconds = referenceMs / 1000;
    this.answerMs += ANSWER_TIMES * referenceMs;
    worker.onmessage = ({ data }: MessageEvent<GraphicsReport>) => {
      if (data.type === "fault") this.fail(data.text);
      else this.waiting?.resolve(data);
    };
    worker.onerror = (event) => this.fail(event.message || "its worker failed");
  }

  /**
   * The card, after it gave on `probe` what WebAssembly gives.
   *
   * @throws GraphicsFault where it is absent, fails, is too slow or differs by more than the export's bounds.
   */
  static async open(base: string, onnx: Uint8Array, description: ModelDescription, wasm: Network, probe: Float32Array
  ): Promise<Graphics> {
    if (!("gpu" in navigator)) throw new GraphicsFault("this browser gives workers no WebGPU");
    const started = performance.now();
    const truth = await wasm(probe, true);
    const referenceMs = performance.now() - started;
    let worker: Worker;
    try {
      worker = new Worker(new URL("./graphicsWorker.ts", import.meta.url), { type: "module", name: "graphics" });
    } catch (error) {
      throw new GraphicsFault(`the browser starts no worker for it (${String(error)})`);
    }
    const card = new Graphics(worker, description, probe, truth, referenceMs);
    try {
      await card.asked({ type: "load", base, onnx, description }, LOAD_MS);
      await card.demandRight();
    } catch (error) {
      card.end();
      throw error;
    }
    return card;
  }

  /** Probabilities of one window. @throws GraphicsFault; the card is of no use from then on. */
  async probs(window: Float32Array): Promise<Float32Array> {
    const started = performance.now();
    const { probs } = await this.answer(window, false);
    this.spent.push(performance.now() - started);
    return probs;
  }

  /** @throws GraphicsFault where the card does not say what WebAssembly said of the probe. */
  async demandRight() {
    const faults = parityFaults(this.truth, await this.answer(this.probe, true), this.description);
    if (faults.length) throw new GraphicsFault(`its answers are not those of WebAssembly (${faults.join("; ")})`);
  }

  /** Mean of the windows so far; 0 before the first. */
  get secondsPerWindow(): number {
    return this.spent.reduce((a, b) => a + b, 0) / 1000 / (this.spent.length || 1);
  }

  end() {
    this.worker.terminate();
  }

  private async answer(window: Float32Array, withLogits: boolean): Promise<Answer> {
    const report = await this.asked({ type: "run", window, withLogits }, this.answerMs);
    if (report.type !== "answer" || !areProbabilities(report.probs, this.description.numOutputs)) {
      throw new GraphicsFault("its answer to a window is no probabilities");
    }
    return report;
  }

  private asked(order: GraphicsOrder, patienceMs: number): Promise<GraphicsReport> {
    return new Promise((resolve, reject) => {
      // A card that was lost since its last answer must not be asked: its worker would hang.
      if (this.fault) return reject(this.fault);
      const late = `it gave no answer within ${Math.round(patienceMs / 1000)} s`;
      const clock = setTimeout(() => this.fail(late), patienceMs);
      const settled = <T>(settle: (value: T) => void) => (value: T) => {
        clearTimeout(clock);
        settle(value);
      };
      this.waiting = { resolve: settled(resolve), reject: settled(reject) };
      this.worker.postMessage(order);
    });
  }

  private fail(text: string) {
    this.fault ??= new GraphicsFault(text);
    this.waiting?.reject(this.fault);
  }
}
