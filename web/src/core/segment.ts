/** From a prepared scan to labels: windows, one after another, stitched and restored; the line of `inference/pipeline.py`. */
import { AppError } from "./errors.ts";
import type { Triple } from "./grid.ts";
import type { ModelDescription } from "./model.ts";
import { gaussianImportance, gridStarts, padTo, Stitcher, unpadSlab, type Padded } from "./patches.ts";
import { planGrid, prepareCt, type Undo } from "./preprocess.ts";
import { SlabRestorer } from "./restore.ts";

/** Probabilities [K, D, H, W] of one window [D, H, W]. */
export type Predict = (window: Float32Array) => Promise<Float32Array>;
export type Progress = (done: number, total: number) => void;

export interface Prepared {
  voxels: Float32Array;
  undo: Undo;
}

/** The scan as the model sees it; the caller may let go of the scan's voxels then. */
export function prepare(voxels: Float32Array, shape: Triple, spacingMm: Triple, model: ModelDescription): Prepared {
  const undo = planGrid(voxels, shape, spacingMm, model);
  return { voxels: prepareCt(voxels, undo, model), undo };
}

export interface Segmented {
  /** On the scan's own grid. */
  labels: Uint8Array;
  /** Mean probability of each label's voxels, background first as 0. */
  confidence: number[];
}

/** Labels on the scan's own grid. */
export async function segmentPrepared({ voxels, undo }: Prepared, model: ModelDescription, predict: Predict,
  progress: Progress): Promise<Segmented> {
  const { patch, numOutputs } = model;
  const padded = padTo(voxels, undo.preparedShape, patch, model.air);
  const starts = gridStarts(padded.shape, patch, model.overlap);
  const weights = model.gaussian ? gaussianImportance(patch)
    : new Float32Array(patch[0] * patch[1] * patch[2]).fill(1);
  const stitcher = new Stitcher(padded.shape, numOutputs, patch, weights);
  const restorer = new SlabRestorer(undo, numOutputs);
  const answer = withBlankKept(predict);
  let doneZ = 0;
  const takeOut = (uptoZ: number) => {
    for (const slab of stitcher.finished(uptoZ)) {
      demandFinite(slab.values);
      restorer.add(unpadSlab(slab, doneZ, padded, undo.preparedShape, numOutputs));
      doneZ += slab.depth;
    }
  };
  for (const [i, start] of starts.entries()) {
    takeOut(start[0]);
    stitcher.add(await answer(cut(padded, start, patch)), start);
    progress(i + 1, starts.length);
  }
  takeOut(padded.shape[0]);
  return { labels: restorer.finish(), confidence: restorer.confidence() };
}

/** The window that holds the most of what is not air: what a runtime is probed with. */
export function fullestWindow({ voxels, undo }: Prepared, { patch, overlap, air }: ModelDescription): Float32Array {
  const padded = padTo(voxels, undo.preparedShape, patch, air);
  let [most, fullest] = [-1, null as Float32Array | null];
  for (const start of gridStarts(padded.shape, patch, overlap)) {
    const window = cut(padded, start, patch);
    let count = 0;
    for (const value of window) if (value > air) count++;
    if (count > most) [most, fullest] = [count, window];
  }
  return fullest!;
}

function cut({ values, shape: [, ny, nx] }: Padded, [z0, y0, x0]: Triple, [depth, height, width]: Triple
): Float32Array {
  const out = new Float32Array(depth * height * width);
  let to = 0;
  for (let z = z0; z < z0 + depth; z++) {
    for (let y = y0; y < y0 + height; y++, to += width) {
      const from = (z * ny + y) * nx + x0;
      out.set(values.subarray(from, from + width), to);
    }
  }
  return out;
}

/** Windows that hold nothing but air are one and the same input: the first answer is used again. */
function withBlankKept(predict: Predict): Predict {
  let [least, kept] = [Infinity, null as Float32Array | null];
  return async (window) => {
    const value = window[0]!;
    const blank = window.every((v) => v === value);
    if (blank && kept && value === least) return kept;
    const probs = await predict(window);
    if (blank && value < least) [least, kept] = [value, probs.slice()];
    return probs;
  };
}

function demandFinite(values: Float32Array) {
  let sum = 0;
  for (const v of values) sum += v;
  if (Number.isFinite(sum)) return;
  throw new AppError("NONFINITE", "model", "expected probabilities, the network returned NaN or infinity",
    "take another model");
}
