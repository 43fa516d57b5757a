/** How the slices of a series lie above each other: straight, complete and even, or refused. */
import type { CtSlice } from "./dicomFile.ts";
import { AppError } from "./errors.ts";
import type { Triple } from "./grid.ts";

const SAME_DIRECTION = 1e-3;
const MAX_GAP = 1.5;
const MAX_GAP_SHARE = 0.2;
const MAX_UNEVEN = 2;
/** Positions are rounded when written; within this share of the spacing they are even. */
const EVEN_TOLERANCE = 0.05;

export function normalOf({ orientation: [a, b] }: CtSlice): Triple {
  const n = [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
  const length = Math.sqrt(n[0]! * n[0]! + n[1]! * n[1]! + n[2]! * n[2]!);
  return n.map((v) => v / length) as Triple;
}

function offsetsOf(stack: CtSlice[]): Triple[] {
  return stack.map((s) => s.position.map((v, i) => v - stack[0]!.position[i]!) as Triple);
}

/** Millimetres above the first slice. */
export function heightsOf(stack: CtSlice[]): number[] {
  const n = normalOf(stack[0]!);
  return offsetsOf(stack).map((o) => o[0] * n[0] + o[1] * n[1] + o[2] * n[2]);
}

/** The stack must rise along the normal; a tilted gantry lets it lean. */
export function demandStraight(stack: CtSlice[], heights: number[], where: string) {
  const first = stack[0]!;
  const n = normalOf(first);
  const sideways = offsetsOf(stack).map((o, i) => o.map((v, axis) => v - heights[i]! * n[axis]!));
  const drift = Math.max(...sideways.map((v) => Math.hypot(...v)));
  const top = heights.at(-1)!;
  // Lean as a ratio, with room for rounding of the written positions.
  if (drift <= Math.max(SAME_DIRECTION * top, 0.1 * Math.min(...first.spacingMm))) return;
  const lean = sideways.at(-1)!.map((v) => v / top);
  const off = Math.max(...sideways.map((v, i) => Math.max(...v.map((s, axis) => Math.abs(s - heights[i]! * lean[axis]!)))));
  if (off <= 0.5 * Math.min(...first.spacingMm)) {
    const tilt = (Math.atan(Math.hypot(...lean)) * 180) / Math.PI;
    throw new AppError("GANTRY_TILT", where, `the gantry was tilted by ${tilt.toFixed(1)} degrees, the volume is sheared`,
      "resample the series to an orthogonal grid first, for example with a gantry-tilt correction");
  }
  throw new AppError("MISALIGNED", where, `slices are shifted sideways by up to ${drift.toFixed(1)} mm`,
    "export the series again");
}

export function demandComplete(heights: number[], where: string) {
  const gaps = gapsOf(heights);
  const usual = median(gaps);
  const wide = gaps.flatMap((gap, i) => (gap > MAX_GAP * usual ? [i] : []));
  if (wide.length === 0 || wide.length > MAX_GAP_SHARE * gaps.length) return;
  const listed = wide.slice(0, 5).map((i) => `${Math.max(1, Math.round(gaps[i]! / usual) - 1)} after slice ${i + 1} at `
    + `${heights[i]!.toFixed(1)} mm`).join(", ");
  const more = wide.length > 5 ? ` and ${wide.length - 5} more gaps` : "";
  throw new AppError("MISSING_SLICES", where, `expected slices every ${short(usual)} mm, missing are ${listed}${more}`,
    "export the series again, whole");
}

/** Voxels on even slices, and their distance. */
export function evenSlices(voxels: Float32Array, plane: number, heights: number[], where: string, warnings: string[]
): { voxels: Float32Array; stepMm: number } {
  const gaps = gapsOf(heights);
  const stepMm = heights.at(-1)! / gaps.length;
  if (heights.every((h, i) => Math.abs(h - stepMm * i) <= EVEN_TOLERANCE * stepMm)) return { voxels, stepMm };
  const [least, most] = [Math.min(...gaps), Math.max(...gaps)];
  const spread = `slices are ${short(least)} to ${short(most)} mm apart`;
  if (most > MAX_UNEVEN * least) {
    throw new AppError("UNEVEN_SPACING", where, spread, "reconstruct the scan with even slices");
  }
  const step = median(gaps);
  warnings.push(`${spread}; resampled to ${short(step)} mm`);
  const count = Math.floor(heights.at(-1)! / step + 1e-6) + 1;
  const out = new Float32Array(count * plane);
  for (let i = 0; i < count; i++) {
    let above = heights.findIndex((h) => h >= i * step);
    above = Math.min(Math.max(above < 0 ? heights.length : above, 1), heights.length - 1);
    const share = (i * step - heights[above - 1]!) / (heights[above]! - heights[above - 1]!);
    const weight = Math.min(Math.max(share, 0), 1);
    const [a, b] = [(above - 1) * plane, above * plane];
    for (let k = 0; k < plane; k++) out[i * plane + k] = (1 - weight) * voxels[a + k]! + weight * voxels[b + k]!;
  }
  return { voxels: out, stepMm: step };
}

function gapsOf(heights: number[]): number[] {
  return heights.slice(1).map((h, i) => h - heights[i]!);
}

function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

function short(value: number): string {
  return String(Number(value.toPrecision(3)));
}
