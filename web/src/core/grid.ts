/**
 * From a file's own voxel axes to [z, y, x] nearest RAS+, and back; the counterpart of `io/grid.py`.
 *
 * Everything that touches axis order is in this module. Affines are 16 numbers, row by row.
 */
import type { AcquiredSlices } from "./acquired.ts";
import { AppError } from "./errors.ts";

export type Triple = [number, number, number];
export type Affine = number[];

const ROUNDING_COSINE = 1e-4;
const MAX_COSINE = 1e-3;
const MAX_ENTRY_MM = 1e6;
const [MIN_SPACING_MM, MAX_SPACING_MM] = [0.1, 20];
const [MIN_FOV_MM, MAX_FOV_MM] = [20, 2500];

/** How the file stored the array: canonical axis i (0 = x, 1 = y, 2 = z) is the file's axis `axisOf[i]`. */
export interface SourceGrid {
  /** In the file's own axis order. */
  shape: Triple;
  /** The file's voxel indexes to RAS+ mm. */
  affine: Affine;
  axisOf: Triple;
  flipped: [boolean, boolean, boolean];
  /** Of a DICOM series whose slices lean or lie unevenly; null where they are the grid's own. */
  acquired: AcquiredSlices | null;
}

export function columnLengths(affine: Affine): Triple {
  // Not Math.hypot: this is NumPy's order of rounding, and a bit decides how many voxels make 5 mm.
  return [0, 1, 2].map((c) => Math.sqrt(affine[c]! ** 2 + affine[4 + c]! ** 2 + affine[8 + c]! ** 2)) as Triple;
}

/** The rotation nearest to a 3x3 with independent columns, by Newton's iteration for the polar factor. */
function nearestRotation(m: number[]): number[] {
  let r = m;
  for (let i = 0; i < 60; i++) {
    const t = inverseTransposed(r);
    const next = r.map((v, k) => (v + t[k]!) / 2);
    const change = Math.max(...next.map((v, k) => Math.abs(v - r[k]!)));
    r = next;
    if (change < 1e-15) break;
  }
  return r;
}

function inverseTransposed(m: number[]): number[] {
  const [a, b, c, d, e, f, g, h, i] = m as [number, number, number, number, number, number, number, number, number];
  const cofactors = [e * i - f * h, f * g - d * i, d * h - e * g, c * h - b * i, a * i - c * g, b * g - a * h,
    b * f - c * e, c * d - a * f, a * e - b * d];
  const det = a * cofactors[0]! + b * cofactors[1]! + c * cofactors[2]!;
  return cofactors.map((v) => v / det);
}

function directionsOf(affine: Affine): number[] {
  const lengths = columnLengths(affine).map((n) => (n > 0 ? n : 1));
  return [0, 1, 2].flatMap((r) => [0, 1, 2].map((c) => affine[4 * r + c]! / lengths[c]!));
}

/** The grid of a file, with its way to the nearest RAS+ order. *Source*: nibabel's io_orientation. */
export function sourceGrid(shape: Triple, affine: Affine): SourceGrid {
  const r = nearestRotation(directionsOf(affine));
  const strength = (axis: number) => Math.max(...[0, 1, 2].map((row) => r[3 * row + axis]! ** 2));
  const order = [0, 1, 2].sort((a, b) => strength(b) - strength(a) || a - b);
  const axisOf: Triple = [0, 0, 0];
  const flipped: [boolean, boolean, boolean] = [false, false, false];
  for (const axis of order) {
    let out = 0;
    for (const row of [1, 2]) if (Math.abs(r[3 * row + axis]!) > Math.abs(r[3 * out + axis]!)) out = row;
    axisOf[out] = axis;
    flipped[out] = r[3 * out + axis]! < 0;
    for (const c of [0, 1, 2]) r[3 * out + c] = 0;
  }
  return { shape, affine, axisOf, flipped, acquired: null };
}

/** (z, y, x) of the array in memory. */
export function canonicalShape(source: SourceGrid): Triple {
  const [x, y, z] = source.axisOf.map((axis) => source.shape[axis]!) as Triple;
  return [z, y, x];
}

/** Voxel (x, y, z) of the array in memory to RAS+ mm. */
export function canonicalAffine(source: SourceGrid): Affine {
  const result = source.affine.slice();
  for (const r of [0, 1, 2, 3]) {
    let offset = source.affine[4 * r + 3]!;
    for (const axis of [0, 1, 2]) {
      const fileAxis = source.axisOf[axis]!;
      const entry = source.affine[4 * r + fileAxis]!;
      result[4 * r + axis] = source.flipped[axis] ? -entry : entry;
      if (source.flipped[axis]) offset += entry * (source.shape[fileAxis]! - 1);
    }
    result[4 * r + 3] = offset;
  }
  return result;
}

/** Where canonical voxel (0, 0, 0) lies in the file's array, and the file's strides for canonical (z, y, x). */
function walk(source: SourceGrid): { origin: number; strides: Triple } {
  const fileStrides = [1, source.shape[0], source.shape[0] * source.shape[1]];
  let origin = 0;
  const strides = source.axisOf.map((axis, i) => {
    if (source.flipped[i]) origin += (source.shape[axis]! - 1) * fileStrides[axis]!;
    return source.flipped[i] ? -fileStrides[axis]! : fileStrides[axis]!;
  }) as Triple;
  return { origin, strides: [strides[2], strides[1], strides[0]] };
}

type Numbers = { [index: number]: number; readonly length: number };

/** A file's array, its first axis fastest, to [z, y, x]; `convert` is applied to each value. */
export function toCanonical(stored: Numbers, source: SourceGrid, out: Numbers, convert: (value: number) => number) {
  const [nz, ny, nx] = canonicalShape(source);
  const { origin, strides: [sz, sy, sx] } = walk(source);
  let to = 0;
  for (let z = 0; z < nz; z++) {
    for (let y = 0; y < ny; y++) {
      for (let x = 0, from = origin + z * sz + y * sy; x < nx; x++, from += sx) out[to++] = convert(stored[from]!);
    }
  }
}

/** The inverse of `toCanonical`, for labels. */
export function fromCanonical(labels: Uint8Array, source: SourceGrid): Uint8Array {
  const [nz, ny, nx] = canonicalShape(source);
  const { origin, strides: [sz, sy, sx] } = walk(source);
  const out = new Uint8Array(labels.length);
  let from = 0;
  for (let z = 0; z < nz; z++) {
    for (let y = 0; y < ny; y++) {
      for (let x = 0, to = origin + z * sz + y * sy; x < nx; x++, to += sx) out[to] = labels[from++]!;
    }
  }
  return out;
}

/** An affine that can be believed; what was put right is added to `warnings`. */
export function checkAffine(affine: Affine, where: string, name: string, warnings: string[]): Affine {
  const remedy = "repair the header of the file";
  if (!affine.every((v) => Math.abs(v) <= MAX_ENTRY_MM)) {
    throw new AppError("AFFINE_NONFINITE", where, `the ${name} has NaN, infinite or absurdly large entries`, remedy);
  }
  const lengths = columnLengths(affine);
  const d = directionsOf(affine);
  const det = d[0]! * (d[4]! * d[8]! - d[5]! * d[7]!) - d[1]! * (d[3]! * d[8]! - d[5]! * d[6]!)
    + d[2]! * (d[3]! * d[7]! - d[4]! * d[6]!);
  if (lengths.includes(0) || Math.abs(det) < 1e-3) {
    throw new AppError("AFFINE_SINGULAR", where, `the ${name} does not map voxels to three directions of space`,
      remedy);
  }
  const cosine = Math.max(...[[0, 1], [0, 2], [1, 2]].map(([a, b]) =>
    Math.abs(d[a!]! * d[b!]! + d[3 + a!]! * d[3 + b!]! + d[6 + a!]! * d[6 + b!]!)));
  if (cosine <= ROUNDING_COSINE) return affine;
  if (cosine > MAX_COSINE) {
    throw new AppError("AFFINE_SHEAR", where, `the ${name} is sheared: expected axes at right angles, got a cosine of `
      + cosine.toFixed(4), "resample the scan to an orthogonal grid first");
  }
  warnings.push(`the ${name} is off right angles by a cosine of ${cosine.toFixed(5)}; the nearest rotation is taken`);
  const rotation = nearestRotation(d);
  const repaired = affine.slice();
  for (const r of [0, 1, 2]) for (const c of [0, 1, 2]) repaired[4 * r + c] = rotation[3 * r + c]! * lengths[c]!;
  return repaired;
}

/** Refuses spacings and fields of view that no CT of a human has. */
export function checkExtent(affine: Affine, shape: Triple, where: string) {
  const spacing = columnLengths(affine);
  const fov = spacing.map((mm, i) => mm * shape[i]!);
  const text = (numbers: number[]) => numbers.map((n) => String(Number(n.toPrecision(4)))).join(" x ");
  const remedy = "correct the spacing in the header";
  if (spacing.some((mm) => mm < MIN_SPACING_MM || mm > MAX_SPACING_MM)) {
    throw new AppError("SPACING", where, `expected spacings from ${MIN_SPACING_MM} to ${MAX_SPACING_MM} mm, got `
      + text(spacing), remedy);
  }
  if (fov.some((mm) => mm < MIN_FOV_MM || mm > MAX_FOV_MM)) {
    throw new AppError("SPACING", where, `expected a field of view from ${MIN_FOV_MM} to ${MAX_FOV_MM} mm, got `
      + text(fov), remedy);
  }
}

/** The largest distance of a grid's corners under two affines, in voxels of the finer one. */
export function cornersApartVox(a: Affine, b: Affine, shape: Triple): number {
  let apart = 0;
  for (let corner = 0; corner < 8; corner++) {
    const at = [0, 1, 2].map((i) => (corner & (1 << i) ? shape[i]! - 1 : 0));
    const delta = [0, 1, 2].map((r) => a[4 * r + 3]! - b[4 * r + 3]!
      + at.reduce((sum, v, c) => sum + v * (a[4 * r + c]! - b[4 * r + c]!), 0));
    apart = Math.max(apart, Math.hypot(...delta));
  }
  return apart / Math.min(...columnLengths(a), ...columnLengths(b));
}
