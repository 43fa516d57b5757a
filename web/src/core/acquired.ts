/**
 * Slices as a scanner made them, and the straight, even grid that they are resampled to: there and back.
 *
 * The counterpart of `io/dicom/acquired.py`, rounded where NumPy rounds.
 */
import type { Affine, SourceGrid, Triple } from "./grid.ts";

/** Columns and rows. */
export type Pair = [number, number];

/** Where the slices of a series lie on the grid that they were resampled to. */
export interface AcquiredSlices {
  /** Of each slice, in slices of the grid. */
  heights: number[];
  /** Voxel (column, row) of a slice lies so many columns and rows further on the grid. */
  shifts: Pair[];
  columns: number;
  rows: number;
}

/** How slices lie above each other. */
export interface Stacking {
  /** Of each slice above the first. */
  heightsMm: number[];
  /** Columns and rows a millimetre of height; 0 where the stack is straight. */
  lean: Pair;
  /** Between slices of the grid. */
  stepMm: number;
  /** Whether the slices lie at the heights of the grid. */
  isEven: boolean;
}

export interface StraightGrid {
  /** Columns, rows, slices. */
  shape: Triple;
  /** Columns and rows by which it begins before the first slice. */
  start: Pair;
  /** What its slices are moved by. */
  shifts: Pair[];
  /** Null where the slices are the grid's own. */
  acquired: AcquiredSlices | null;
}

/** What rounding may add to a whole number of voxels. */
const ROUNDING_VOX = 1e-6;
const AIR_HU = -1024;

/** The grid that holds all slices of `rows` x `columns`. */
export function straightGrid({ heightsMm, lean, stepMm, isEven }: Stacking, columns: number, rows: number
): StraightGrid {
  const leaning = (heightMm: number) => lean.map((v) => heightMm * v) as Pair;
  const acquired = heightsMm.map(leaning);
  const start = [0, 1].map((i) => acquired.reduce((least, shift) => Math.min(least, shift[i]!), 0)) as Pair;
  const fromStart = (shift: Pair) => shift.map((v, i) => v - start[i]!) as Pair;
  const count = isEven ? heightsMm.length : Math.floor(heightsMm.at(-1)! / stepMm + ROUNDING_VOX) + 1;
  const shifts = Array.from({ length: count }, (_, k) => fromStart(leaning(k * stepMm)));
  const room = (i: 0 | 1) => Math.ceil(shifts.reduce((most, shift) => Math.max(most, shift[i]), 0) - ROUNDING_VOX);
  return { shape: [columns + room(0), rows + room(1), count], start, shifts,
    acquired: isEven && !leans(lean) ? null
      : { heights: heightsMm.map((h) => h / stepMm), shifts: acquired.map(fromStart), columns, rows } };
}

/** float32 [slice, row, column] on the grid, by linear interpolation, air around it; `voxels` itself where it is the
 * grid's own. */
export function onGrid(voxels: Float32Array, stacking: Stacking, { shape, shifts, acquired }: StraightGrid
): Float32Array {
  if (!acquired) return voxels;
  const { columns, rows } = acquired;
  const [wide, high, count] = shape;
  const out = new Float32Array(wide * high * count);
  const [even, lower] = [new Float32Array(rows * columns), new Float32Array(high * columns)];
  for (let k = 0; k < count; k++) {
    const plane = stacking.isEven ? voxels.subarray(k * rows * columns, (k + 1) * rows * columns)
      : evenPlane(voxels, stacking.heightsMm, k * stacking.stepMm, even);
    const to = out.subarray(k * wide * high, (k + 1) * wide * high);
    if (!leans(stacking.lean)) {
      to.set(plane);
      continue;
    }
    const [right, down] = shifts[k]!;
    movedRows(plane, rows, columns, down, high, lower);
    movedColumns(lower, high, columns, right, wide, to);
  }
  return out;
}

function leans(lean: Pair): boolean {
  return lean.some((v) => v !== 0);
}

/** The plane at a height, between its neighbours. */
function evenPlane(voxels: Float32Array, heightsMm: number[], heightMm: number, out: Float32Array): Float32Array {
  const last = heightsMm.length - 1;
  const found = heightsMm.findIndex((h) => h >= heightMm);
  const above = Math.min(Math.max(found < 0 ? last : found, 1), last);
  const share = (heightMm - heightsMm[above - 1]!) / (heightsMm[above]! - heightsMm[above - 1]!);
  const weight = Math.min(Math.max(share, 0), 1);
  const [a, b] = [(above - 1) * out.length, above * out.length];
  for (let i = 0; i < out.length; i++) out[i] = (1 - weight) * voxels[a + i]! + weight * voxels[b + i]!;
  return out;
}

/** What voxel `at` of a line that was moved is made of: two voxels and the weight of the second; null is air. A border
 * voxel keeps its value up to half a voxel outwards, so that tissue that the field of view cuts is not mixed with air. */
function taps(length: number, wide: number, shift: number): ([number, number, number] | null)[] {
  return Array.from({ length: wide }, (_, index) => {
    const at = index - shift;
    if (at < -0.5 || at > length - 0.5) return null;
    const below = Math.min(Math.max(Math.floor(at), 0), length - 1);
    return [below, Math.min(below + 1, length - 1), Math.fround(Math.min(Math.max(at - below, 0), 1))];
  });
}

function movedRows(plane: Float32Array, rows: number, columns: number, shift: number, high: number,
  out: Float32Array) {
  for (const [y, tap] of taps(rows, high, shift).entries()) {
    if (!tap) out.fill(AIR_HU, y * columns, (y + 1) * columns);
    else {
      const [below, above, weight] = [tap[0] * columns, tap[1] * columns, tap[2]];
      for (let x = 0; x < columns; x++) out[y * columns + x] = between(plane[below + x]!, plane[above + x]!, weight);
    }
  }
}

function movedColumns(plane: Float32Array, rows: number, columns: number, shift: number, wide: number,
  out: Float32Array) {
  const line = taps(columns, wide, shift);
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < wide; x++) {
      const tap = line[x]!;
      out[y * wide + x] = tap ? between(plane[y * columns + tap[0]]!, plane[y * columns + tap[1]]!, tap[2]) : AIR_HU;
    }
  }
}

/** In float32, as NumPy has it. */
function between(low: number, high: number, weight: number): number {
  return Math.fround(low + Math.fround(Math.fround(high - low) * weight));
}

/** Labels [slice, row, column] of the grid on the slices as they were acquired: of each voxel of a slice the voxel of
 * the grid that its centre lies in. */
export function asAcquired(planes: Uint8Array, { shape: [wide, high, count], acquired }: SourceGrid): Uint8Array {
  if (!acquired) return planes;
  const { columns, rows, heights, shifts } = acquired;
  const out = new Uint8Array(heights.length * rows * columns);
  let to = 0;
  for (const [k, height] of heights.entries()) {
    const plane = nearest(height, count) * wide * high;
    const [right, down] = shifts[k]!;
    const across = Array.from({ length: columns }, (_, x) => nearest(x + right, wide));
    for (let y = 0; y < rows; y++) {
      const from = plane + nearest(y + down, high) * wide;
      for (let x = 0; x < columns; x++) out[to++] = planes[from + across[x]!]!;
    }
  }
  return out;
}

/** The nearest of 0..length - 1; of two, the even one, as NumPy's rint has it. */
function nearest(at: number, length: number): number {
  const below = Math.floor(at);
  const up = at - below > 0.5 || (at - below === 0.5 && below % 2 !== 0);
  return Math.min(Math.max(up ? below + 1 : below, 0), length - 1);
}

/** Columns, rows and slices as they were acquired. */
export function sliceShape({ shape, acquired }: SourceGrid): Triple {
  return acquired ? [acquired.columns, acquired.rows, acquired.heights.length] : shape;
}

/** Where slice `k` begins on the grid: columns, rows, slices. */
export function sliceStart({ acquired }: SourceGrid, k: number): Triple {
  return acquired ? [...acquired.shifts[k]!, acquired.heights[k]!] : [0, 0, k];
}

/** The affine of a grid that begins so many columns and rows elsewhere. */
export function movedBy(affine: Affine, [columns, rows]: Pair): Affine {
  return affine.map((v, i) => (i % 4 === 3 && i < 12 ? v + affine[i - 3]! * columns + affine[i - 2]! * rows : v));
}
