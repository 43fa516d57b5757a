/** From a scan to the numbers a model sees: `plan_grid` and `prepare_ct` of `geometry/preprocess.py`, bit for bit. */
import { findBody, type Box } from "./body.ts";
import type { Triple } from "./grid.ts";
import type { ModelDescription } from "./model.ts";
import { lerp, lerpPlane, rowsFirst, Taps, type Plane } from "./resample.ts";

const CT_RANGE_HU = [-1024, 3071] as const;

/** What the way back needs to know of the two grids. */
export interface Undo {
  nativeShape: Triple;
  /** The part of the scan that was kept. */
  box: Box;
  /** Of the grid the model sees, which covers `box` corner on corner. */
  preparedShape: Triple;
}

export function boxShape({ start, stop }: Box): Triple {
  return stop.map((b, i) => b - start[i]!) as Triple;
}

/** Python's `round`: halves go to the even neighbour. */
export function roundHalfEven(value: number): number {
  const below = Math.floor(value);
  const rest = value - below;
  if (rest !== 0.5) return rest < 0.5 ? below : below + 1;
  return below % 2 === 0 ? below : below + 1;
}

/** The prepared grid of a scan, before anything is allocated for it. */
export function planGrid(voxels: Float32Array, shape: Triple, spacingMm: Triple, model: ModelDescription): Undo {
  const box: Box = model.cropToBody ? findBody(voxels, shape, spacingMm) : { start: [0, 0, 0], stop: [...shape] };
  const target = model.spacingMm ?? spacingMm;
  const preparedShape = boxShape(box).map((n, i) =>
    Math.max(1, roundHalfEven((n * spacingMm[i]!) / target[i]!))) as Triple;
  return { nativeShape: shape, box, preparedShape };
}

/** Crop, resample linearly, clip to the HU window, normalise; float32 of `undo.preparedShape`. */
export function prepareCt(voxels: Float32Array, undo: Undo, model: ModelDescription): Float32Array {
  const [lowHu, highHu] = model.huWindow;
  const low = Math.min(CT_RANGE_HU[0], lowHu);
  const high = Math.max(CT_RANGE_HU[1], highHu);
  const kept = boxShape(undo.box);
  const [z, y, x] = kept.map((n, i) => Taps.between(n, undo.preparedShape[i]!)) as [Taps, Taps, Taps];
  const yBeforeX = rowsFirst(kept, undo.preparedShape);
  const planes = new Map<number, Plane>();
  const plane = (index: number): Plane => {
    let found = planes.get(index);
    if (!found) {
      found = lerpPlane(clippedSlice(voxels, undo, index, low, high), y, x, yBeforeX);
      planes.set(index, found);
    }
    return found;
  };
  const size = undo.preparedShape[1] * undo.preparedShape[2];
  const out = new Float32Array(undo.preparedShape[0] * size);
  const [subtract, divide] = [Math.fround(model.subtractHu), Math.fround(model.divideHu)];
  for (let j = 0; j < undo.preparedShape[0]; j++) {
    for (const index of planes.keys()) if (index < z.below[j]!) planes.delete(index);
    const slice = out.subarray(j * size, (j + 1) * size);
    lerp(plane(z.below[j]!).values, plane(z.above[j]!).values, z.weight[j]!, slice);
    for (let i = 0; i < size; i++) {
      const hu = Math.fround(Math.min(Math.max(slice[i]!, lowHu), highHu));
      slice[i] = Math.fround(Math.fround(hu - subtract) / divide);
    }
  }
  return out;
}

/** One slice of the box; what CT cannot mean is clipped before it bleeds into its neighbours. */
function clippedSlice(voxels: Float32Array, { nativeShape, box }: Undo, index: number, low: number, high: number
): Plane {
  const [, height, width] = boxShape(box);
  const values = new Float32Array(height * width);
  for (let y = 0, to = 0; y < height; y++) {
    const row = ((box.start[0] + index) * nativeShape[1] + box.start[1] + y) * nativeShape[2] + box.start[2];
    for (let x = 0; x < width; x++) values[to++] = Math.min(Math.max(voxels[row + x]!, low), high);
  }
  return { values, height, width };
}
