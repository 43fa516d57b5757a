/** Are these numbers Hounsfield units? The checks of `io/intensity.py`, with the same limits. */
import { AppError } from "./errors.ts";
import type { Triple } from "./grid.ts";

const AIR_HU = -1024;
const PADDING_BELOW_HU = -1500;
const MAX_HU = 30710;
const MAX_NONFINITE_SHARE = 0.01;
const MAX_OVERFLOW_SHARE = 1e-4;
const LOW_MUST_BE_BELOW_HU = -50;
const HIGH_MUST_BE_ABOVE_HU = -50;
const MIN_CONTRAST_HU = 100;
const MAX_SAMPLES = 2_000_000;

/** Checks float32 [z, y, x] and puts right, in place, what has one meaning only; says it in `warnings`. */
export function checkHounsfield(voxels: Float32Array, shape: Triple, where: string, warnings: string[]) {
  fillNonfinite(voxels, where, warnings);
  let [low, high] = [Infinity, -Infinity];
  for (const v of voxels) {
    if (v < low) low = v;
    if (v > high) high = v;
  }
  if (low === high) throw new AppError("NO_CONTENT", where, `every voxel is ${low}`, "check what was exported");
  if (Math.max(high, -low) > MAX_HU) clipOverflow(voxels, shape, where, low, high, warnings);
  demandHounsfield(voxels, shape, where);
  if (low >= PADDING_BELOW_HU) return;
  let count = 0;
  for (let i = 0; i < voxels.length; i++) {
    if (voxels[i]! < PADDING_BELOW_HU) {
      voxels[i] = AIR_HU;
      count++;
    }
  }
  warnings.push(`${count} voxels below ${PADDING_BELOW_HU} HU (padding, down to ${low}) are taken as air, `
    + `${AIR_HU} HU`);
}

function fillNonfinite(voxels: Float32Array, where: string, warnings: string[]) {
  let count = 0;
  for (const v of voxels) if (!Number.isFinite(v)) count++;
  if (count === 0) return;
  if (count === voxels.length) {
    throw new AppError("NO_CONTENT", where, "every voxel is NaN or infinite", "check what was exported");
  }
  if (count / voxels.length > MAX_NONFINITE_SHARE) {
    throw new AppError("VOXELS_NONFINITE", where, `expected numbers, got ${count} NaN or infinite voxels `
      + `(${((100 * count) / voxels.length).toFixed(1)} %)`, "repair the scan; up to 1 % would be taken as air");
  }
  for (let i = 0; i < voxels.length; i++) if (!Number.isFinite(voxels[i]!)) voxels[i] = AIR_HU;
  warnings.push(`${count} NaN or infinite voxels are taken as air, ${AIR_HU} HU`);
}

function clipOverflow(voxels: Float32Array, shape: Triple, where: string, low: number, high: number,
  warnings: string[]) {
  let count = 0;
  for (const v of voxels) if (Math.abs(v) > MAX_HU) count++;
  if (count > Math.max(3, MAX_OVERFLOW_SHARE * voxels.length)) {
    if (high - low > 60000 && high - low < 70000) {
      throw new AppError("WRAPAROUND", where, `values jump by 65536 (${count} voxels, ${low} to ${high}): a 16-bit `
        + "overflow, or negative numbers stored as unsigned", "export the scan again");
    }
    throw new AppError("NOT_HU", where, `expected Hounsfield units, got values from ${low} to ${high}, `
      + percentilesText(voxels, shape), "export the scan with its rescale slope and intercept");
  }
  for (let i = 0; i < voxels.length; i++) voxels[i] = Math.min(Math.max(voxels[i]!, -MAX_HU), MAX_HU);
  warnings.push(`${count} voxels beyond ${MAX_HU} HU are clipped`);
}

function demandHounsfield(voxels: Float32Array, shape: Triple, where: string) {
  const sorted = sample(voxels, shape);
  const [low, high] = [percentile(sorted, 0.5), percentile(sorted, 99.5)];
  if (low <= LOW_MUST_BE_BELOW_HU && high >= HIGH_MUST_BE_ABOVE_HU && high - low >= MIN_CONTRAST_HU) return;
  throw new AppError("NOT_HU", where, "expected Hounsfield units (air or fat well below 0, tissue near 50), got "
    + percentilesText(voxels, shape), low > LOW_MUST_BE_BELOW_HU && high > 500
    ? "it may be CT stored from 0: export it as Hounsfield units"
    : "export the scan with its rescale slope and intercept");
}

function percentilesText(voxels: Float32Array, shape: Triple): string {
  const sorted = sample(voxels, shape);
  const values = [0.5, 5, 50, 95, 99.5].map((p) => String(Number(percentile(sorted, p).toPrecision(4))));
  return `percentiles 0.5/5/50/95/99.5 = ${values.join("/")}`;
}

/** At most some two million voxels, spread evenly, sorted. */
function sample(voxels: Float32Array, [nz, ny, nx]: Triple): Float32Array {
  const step = Math.max(1, Math.ceil(Math.cbrt(voxels.length / MAX_SAMPLES)));
  const count = Math.ceil(nz / step) * Math.ceil(ny / step) * Math.ceil(nx / step);
  const out = new Float32Array(count);
  let to = 0;
  for (let z = 0; z < nz; z += step) {
    for (let y = 0; y < ny; y += step) {
      for (let x = 0, row = (z * ny + y) * nx; x < nx; x += step) out[to++] = voxels[row + x]!;
    }
  }
  return out.sort();
}

function percentile(sorted: Float32Array, percent: number): number {
  const at = (percent / 100) * (sorted.length - 1);
  const below = Math.floor(at);
  const a = sorted[below]!;
  return a + (sorted[Math.min(below + 1, sorted.length - 1)]! - a) * (at - below);
}
