/** What the graphics card must say to be believed, and what becomes of one that fails. */
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { ModelDescription } from "../src/core/model.ts";
import { areProbabilities, parityFaults, type Answer } from "../src/core/parity.ts";
import { Graphics, GraphicsFault } from "../src/graphics.ts";
import type { GraphicsOrder, GraphicsReport } from "../src/graphicsWorker.ts";

const VOXELS = 10_000;
const model = { organs: [{ value: 1, name: "liver" }, { value: 2, name: "aorta" }], numOutputs: 3,
  bounds: { logitShare: 1e-3, equalShare: 0.9998, dice: 0.99, diceVoxels: 100 } } as unknown as ModelDescription;

/** Background, with 400 voxels of liver and `aorta` of aorta; logits of 0 and 10. */
function answer(aorta: number): Answer {
  const [logits, probs] = [new Float32Array(3 * VOXELS), new Float32Array(3 * VOXELS)];
  for (let i = 0; i < VOXELS; i++) {
    const label = i < 400 ? 1 : i < 400 + aorta ? 2 : 0;
    logits[label * VOXELS + i] = 10;
    probs[label * VOXELS + i] = 1;
  }
  return { logits, probs };
}

describe("parity", () => {
  it("is that of the same answer, and of one that rounding changed", () => {
    expect(parityFaults(answer(200), answer(200), model)).toEqual([]);
    const rounded = answer(200);
    for (let i = 0; i < 3 * VOXELS; i++) rounded.logits[i]! += i % 2 ? 0.009 : -0.009;
    expect(parityFaults(answer(200), rounded, model)).toEqual([]);
  });

  it("is judged by logits, labels and the Dice of each organ of 100 voxels", () => {
    const off = answer(200);
    off.logits[5]! += 0.02;
    expect(parityFaults(answer(200), off, model)).toEqual([expect.stringContaining("logits differ by 0.0020")]);
    const faults = parityFaults(answer(200), answer(195), model);
    expect(faults.map((text) => text.split(" ").slice(0, 3).join(" "))).toEqual(
      ["logits differ by", "99.950 % of", "Dice of aorta"]);
    // One voxel of 90 is no fault of its Dice, and one of 10 000 none of the labels.
    expect(parityFaults(answer(90), answer(89), model)).toEqual([expect.stringContaining("logits")]);
  });

  it("is not that of NaN", () => {
    const broken = answer(200);
    broken.logits[7] = NaN;
    expect(parityFaults(answer(200), broken, model).length).toBe(1);
    expect(parityFaults(broken, answer(200), model).length).toBe(1);
  });

  it("asks for classes that sum up to 1", () => {
    expect(areProbabilities(answer(3).probs, 3)).toBe(true);
    expect(areProbabilities(new Float32Array(30), 3)).toBe(false);
    expect(areProbabilities(answer(3).probs.map((p, i) => (i === 4 ? NaN : p)), 3)).toBe(false);
  });
});

/** A worker that answers as told; null is silence. */
let say: (order: GraphicsOrder, run: number) => GraphicsReport | null = () => null;
let last: FakeWorker;
class FakeWorker {
  onmessage: ((event: { data: GraphicsReport }) => void) | null = null;
  ended = false;
  private runs = 0;

  constructor() {
    last = this;
  }

  postMessage(order: GraphicsOrder) {
    const report = say(order, order.type === "run" ? ++this.runs : 0);
    if (report) setTimeout(() => this.onmessage?.({ data: report }), 10);
  }

  terminate() {
    this.ended = true;
  }
}

describe("the graphics card", () => {
  const wasm = async () => answer(200);
  const window = new Float32Array(8);
  const opened = () => Graphics.open("./", new Uint8Array(0), model, wasm, window);
  const right = (order: GraphicsOrder): GraphicsReport => order.type === "load" ? { type: "ready" }
    : { type: "answer", ...answer(200) };

  beforeEach(() => {
    vi.useFakeTimers();
    vi.stubGlobal("Worker", FakeWorker);
    vi.stubGlobal("navigator", { gpu: {} });
  });
  afterEach(() => {
    vi.useRealTimers();
    vi.unstubAllGlobals();
  });

  /** A promise's value or fault, while the clock runs as far as it asks. */
  async function after<T>(promise: Promise<T>): Promise<T | string> {
    const settled = promise.catch((error: unknown) => {
      expect(error).toBeInstanceOf(GraphicsFault);
      return (error as Error).message;
    });
    await vi.runAllTimersAsync();
    return settled;
  }

  it("is used where it says what WebAssembly says", async () => {
    say = right;
    const card = await after(opened()) as Graphics;
    expect((await after(card.probs(window)) as Float32Array).length).toBe(3 * VOXELS);
    expect(await after(card.demandRight())).toBe(undefined);
    expect(card.secondsPerWindow).toBeCloseTo(0.01);
  });

  it("is refused where the browser has none, or it is silent, fails or differs", async () => {
    say = () => null;
    expect(await after(opened())).toBe("it gave no answer within 120 s");
    expect(last.ended).toBe(true);
    say = (order) => (order.type === "load" ? { type: "ready" } : null);
    expect(await after(opened())).toBe("it gave no answer within 30 s");
    say = () => ({ type: "fault", text: "no adapter" });
    expect(await after(opened())).toBe("no adapter");
    say = (order) => (order.type === "load" ? { type: "ready" } : { type: "answer", ...answer(100) });
    expect(await after(opened())).toMatch(/^its answers are not those of WebAssembly \(logits differ by 1/);
    vi.stubGlobal("navigator", {});
    expect(await after(opened())).toBe("this browser gives workers no WebGPU");
  });

  it("is not asked again once it was lost, even between two windows", async () => {
    say = right;
    const card = await after(opened()) as Graphics;
    let asked = 0;
    say = (order) => {
      asked++;
      return right(order);
    };
    last.onmessage!({ data: { type: "fault", text: "the browser lost the graphics card (unknown)" } });
    expect(await after(card.probs(window))).toBe("the browser lost the graphics card (unknown)");
    expect(asked).toBe(0);
  });

  it("hangs for no longer than the page's patience, and what it gives must be probabilities", async () => {
    say = (order, run) => (run === 2 ? null : right(order));
    const card = await after(opened()) as Graphics;
    expect(await after(card.probs(window))).toBe("it gave no answer within 30 s");
    say = (order, run) => (run === 2 ? { type: "answer", ...answer(200), probs: new Float32Array(3 * VOXELS) } : right(order));
    expect(await after((await after(opened()) as Graphics).probs(window))).toMatch(/no probabilities/);
  });
});
