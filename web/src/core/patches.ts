/** Patch grid, Gaussian importance and stitching: the counterpart of `geometry/patches.py`. */
import type { Triple } from "./grid.ts";
import { roundHalfEven } from "./preprocess.ts";

const SLAB_SLICES = 8;
const IMPORTANCE_FLOOR = 1e-3;

export interface Padded {
  values: Float32Array;
  shape: Triple;
  before: Triple;
}

/** Grows an array to at least `size`, the scan in the middle; returned as it is where it is large enough. */
export function padTo(values: Float32Array, shape: Triple, size: Triple, fill: number): Padded {
  const missing = shape.map((n, i) => Math.max(0, size[i]! - n));
  const before = missing.map((m) => Math.trunc(m / 2)) as Triple;
  if (!missing.some((m) => m > 0)) return { values, shape, before };
  const grown = shape.map((n, i) => n + missing[i]!) as Triple;
  const out = new Float32Array(grown[0] * grown[1] * grown[2]).fill(fill);
  for (let z = 0; z < shape[0]; z++) {
    for (let y = 0; y < shape[1]; y++) {
      const from = (z * shape[1] + y) * shape[2];
      const to = ((z + before[0]) * grown[1] + y + before[1]) * grown[2] + before[2];
      out.set(values.subarray(from, from + shape[2]), to);
    }
  }
  return { values: out, shape: grown, before };
}

/** Where patches start so that they cover an array: per axis evenly spaced, the last flush with the border. */
export function gridStarts(shape: Triple, patch: Triple, overlap: number): Triple[] {
  const [zs, ys, xs] = shape.map((n, i) => axisStarts(n, patch[i]!, overlap)) as [number[], number[], number[]];
  return zs.flatMap((z) => ys.flatMap((y) => xs.map((x): Triple => [z, y, x])));
}

function axisStarts(n: number, patch: number, overlap: number): number[] {
  if (patch < 1 || patch > n) throw new RangeError(`expected a patch of 1 to ${n}, got ${patch}`);
  // The epsilon undoes binary fractions: 10 * (1 - 0.9) is a hair below 1.
  const step = Math.max(1, Math.floor(patch * (1 - overlap) + 1e-6));
  const gaps = Math.ceil((n - patch) / step);
  return gaps ? Array.from({ length: gaps + 1 }, (_, i) => roundHalfEven((i * (n - patch)) / gaps)) : [0];
}

/** Weight of each voxel of a patch: a Gaussian whose sigma is an eighth of the edge, 0.001 at least. */
export function gaussianImportance(patch: Triple): Float32Array {
  const [z, y, x] = patch.map((n) => Float64Array.from({ length: n }, (_, i) =>
    Math.exp(-0.5 * ((i - (n - 1) / 2) / (n / 8)) ** 2))) as [Float64Array, Float64Array, Float64Array];
  const largest = Math.max(...z) * Math.max(...y) * Math.max(...x);
  const out = new Float32Array(patch[0] * patch[1] * patch[2]);
  let to = 0;
  for (const a of z) for (const b of y) for (const c of x) out[to++] = Math.max((a * b * c) / largest, IMPORTANCE_FLOOR);
  return out;
}

/** A few finished slices of all classes: float32 [K, depth, h, w]. */
export interface Slab {
  values: Float32Array;
  depth: number;
}

/**
 * Weighted mean of overlapping windows, rolling along z: only as many slices are kept as a patch is deep.
 *
 * Windows come in z order; before the first window of a new row, `finished` takes out what no later one reaches.
 */
export class Stitcher {
  private readonly sums: Float32Array;
  private readonly weights: Float32Array;
  private doneZ = 0;

  constructor(
    private readonly shape: Triple,
    private readonly numOutputs: number,
    private readonly patch: Triple,
    private readonly importance: Float32Array,
  ) {
    const ring = patch[0] * shape[1] * shape[2];
    this.sums = new Float32Array(numOutputs * ring);
    this.weights = new Float32Array(ring);
  }

  /** One window [K, D, H, W] whose first voxel lies at `start`. */
  add(probs: Float32Array, start: Triple) {
    if (start[0] !== this.doneZ) throw new RangeError(`expected a window at z = ${this.doneZ}, got ${start[0]}`);
    const [depth, height, width] = this.patch;
    const [, ny, nx] = this.shape;
    const ring = depth * ny * nx;
    const voxels = depth * height * width;
    for (let z = 0; z < depth; z++) {
      const slice = ((start[0] + z) % depth) * ny * nx;
      for (let y = 0; y < height; y++) {
        const from = (z * height + y) * width;
        const to = slice + (start[1] + y) * nx + start[2];
        for (let x = 0; x < width; x++) this.weights[to + x]! += this.importance[from + x]!;
        for (let k = 0; k < this.numOutputs; k++) {
          const [p, s] = [k * voxels + from, k * ring + to];
          for (let x = 0; x < width; x++) {
            this.sums[s + x]! += Math.fround(probs[p + x]! * this.importance[from + x]!);
          }
        }
      }
    }
  }

  /** Slices below `uptoZ` as slabs in z order, each handed out once. */
  *finished(uptoZ = this.shape[0]): Generator<Slab> {
    const [depth, plane] = [this.patch[0], this.shape[1] * this.shape[2]];
    while (this.doneZ < uptoZ) {
      const first = this.doneZ % depth;
      const count = Math.min(SLAB_SLICES, uptoZ - this.doneZ, depth - first);
      yield { values: this.takeOut(first * plane, count * plane, depth * plane), depth: count };
      this.doneZ += count;
    }
  }

  private takeOut(first: number, count: number, ring: number): Float32Array {
    const values = new Float32Array(this.numOutputs * count);
    for (let i = 0; i < count; i++) {
      const weight = this.weights[first + i]!;
      if (!(weight > 0)) throw new RangeError("expected windows over all voxels");
      for (let k = 0; k < this.numOutputs; k++) values[k * count + i] = this.sums[k * ring + first + i]! / weight;
    }
    this.weights.fill(0, first, first + count);
    for (let k = 0; k < this.numOutputs; k++) this.sums.fill(0, k * ring + first, k * ring + first + count);
    return values;
  }
}

/** The part of a slab that lies in the array before `padTo`; `z` is the slab's first slice. */
export function unpadSlab(slab: Slab, z: number, padded: Padded, shape: Triple, numOutputs: number): Slab {
  const [, ny, nx] = padded.shape;
  const first = Math.max(0, padded.before[0] - z);
  const depth = Math.min(slab.depth, padded.before[0] + shape[0] - z) - first;
  if (depth <= 0) return { values: new Float32Array(0), depth: 0 };
  if (depth === slab.depth && ny === shape[1] && nx === shape[2]) return slab;
  const values = new Float32Array(numOutputs * depth * shape[1] * shape[2]);
  let to = 0;
  for (let k = 0; k < numOutputs; k++) {
    for (let d = 0; d < depth; d++) {
      for (let y = 0; y < shape[1]; y++, to += shape[2]) {
        const from = ((k * slab.depth + first + d) * ny + padded.before[1] + y) * nx + padded.before[2];
        values.set(slab.values.subarray(from, from + shape[2]), to);
      }
    }
  }
  return { values, depth };
}
