/** How the slices of a series lie above each other: complete, straight or leaning, even or nearly so, or refused. */
import type { Pair, Stacking } from "./acquired.ts";
import type { CtSlice } from "./dicomFile.ts";
import { AppError } from "./errors.ts";
import type { Triple } from "./grid.ts";

const SAME_DIRECTION = 1e-3;
const MAX_GAP = 1.5;
const MAX_GAP_SHARE = 0.2;
const MAX_UNEVEN = 2;
/** Positions are rounded when written; within this share of the spacing they are even. */
const EVEN_TOLERANCE = 0.05;
/** Degrees. Gantries tilt by up to 30; beyond, positions are rather wrong than leaning. */
const MAX_TILT = 35;

export function normalOf({ orientation: [a, b] }: CtSlice): Triple {
  const n: Triple = [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
  const length = Math.sqrt(along(n, n));
  return n.map((v) => v / length) as Triple;
}

/** How the slices lie above each other: refused, or what a grid is made by. */
export function stackingOf(stack: CtSlice[], where: string, warnings: string[]): Stacking {
  const n = normalOf(stack[0]!);
  const offsets = stack.map((s) => s.position.map((v, i) => v - stack[0]!.position[i]!) as Triple);
  const heightsMm = offsets.map((o) => along(o, n));
  const sideways = offsets.map((o, i) => o.map((v, axis) => v - heightsMm[i]! * n[axis]!) as Triple);
  const lean = leanOf(sideways, heightsMm, stack[0]!, where, warnings);
  demandComplete(heightsMm, where);
  return { heightsMm, lean, ...stepOf(heightsMm, where, warnings) };
}

/** Summed in this order in Python, too, so that both have the same bits. */
function along(v: Triple, direction: Triple): number {
  return v[0] * direction[0] + v[1] * direction[1] + v[2] * direction[2];
}

/** Columns and rows a millimetre of height: 0 where the stack rises along the normal, else a tilted gantry's. */
function leanOf(sideways: Triple[], heights: number[], first: CtSlice, where: string, warnings: string[]): Pair {
  const drift = Math.max(...sideways.map((v) => Math.hypot(...v)));
  const top = heights.at(-1)!;
  // Lean as a ratio, with room for rounding of the written positions.
  if (drift <= Math.max(SAME_DIRECTION * top, 0.1 * Math.min(...first.spacingMm))) return [0, 0];
  const lean = sideways.at(-1)!.map((v) => v / top) as Triple;
  const off = Math.max(...sideways.map((v, i) => Math.max(...v.map((s, axis) => Math.abs(s - heights[i]! * lean[axis]!)))));
  if (off > 0.5 * Math.min(...first.spacingMm)) {
    throw new AppError("MISALIGNED", where, `slices are shifted sideways by up to ${drift.toFixed(1)} mm`,
      "export the series again");
  }
  const tilt = (Math.atan(Math.hypot(...lean)) * 180) / Math.PI;
  if (tilt > MAX_TILT) {
    throw new AppError("GANTRY_TILT", where, `expected a gantry that is tilted by up to ${MAX_TILT} degrees, got `
      + `${tilt.toFixed(1)}: the stack is sheared`, "resample the series to a straight grid first");
  }
  warnings.push(`the gantry was tilted by ${tilt.toFixed(1)} degrees; resampled to a straight grid`);
  const [row, column] = first.orientation;
  return [along(row, lean) / first.spacingMm[1], along(column, lean) / first.spacingMm[0]];
}

function demandComplete(heights: number[], where: string) {
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

/** Millimetres between slices of an even grid, and whether the slices lie on it. */
function stepOf(heights: number[], where: string, warnings: string[]): { stepMm: number; isEven: boolean } {
  const gaps = gapsOf(heights);
  const stepMm = heights.at(-1)! / gaps.length;
  if (heights.every((h, i) => Math.abs(h - stepMm * i) <= EVEN_TOLERANCE * stepMm)) return { stepMm, isEven: true };
  const [least, most] = [Math.min(...gaps), Math.max(...gaps)];
  const spread = `slices are ${short(least)} to ${short(most)} mm apart`;
  if (most > MAX_UNEVEN * least) {
    throw new AppError("UNEVEN_SPACING", where, spread, "reconstruct the scan with even slices");
  }
  const step = median(gaps);
  warnings.push(`${spread}; resampled to ${short(step)} mm`);
  return { stepMm: step, isEven: false };
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
