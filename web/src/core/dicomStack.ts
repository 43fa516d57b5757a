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
/** Half a unit of the first decimal, and a little for the line through the positions. */
const ROUNDED_MM = 0.06;
/** But where slices are thinner still, no more than this share of their distance. */
const ROUNDED_SHARE = 0.25;
/** Rounding may put two neighbours nearer to each other or further apart by a whole unit of the last digit. */
const ROUNDED_GAP_MM = 0.11;
/** The spacing of a stack is one that at least this share of its gaps has; blocks of another one are as long as this. */
const MIN_SPACING_SHARE = 0.1;
const MIN_BLOCK_GAPS = 4;
const MAX_LISTED = 5;
/** Degrees. Gantries tilt by up to 30; beyond, positions are rather wrong than leaning. */
const MAX_TILT = 35;

/** The directions of columns and rows, and how the slices lie above each other. */
export type OrientedStacking = Stacking & { orientation: [Triple, Triple] };

export function normalOf([a, b]: [Triple, Triple]): Triple {
  const n = cross(a, b);
  const length = Math.sqrt(along(n, n));
  return n.map((v) => v / length) as Triple;
}

/** How the slices lie above each other: refused, or what a grid is made by. */
export function stackingOf(stack: CtSlice[], where: string, warnings: string[]): OrientedStacking {
  const first = stack[0]!;
  const offsets = stack.map((s) => s.position.map((v, i) => v - first.position[i]!) as Triple);
  const orientation = acrossOf(first, offsets.at(-1)!);
  const n = normalOf(orientation);
  const heightsMm = offsets.map((o) => along(o, n));
  const sideways = offsets.map((o, i) => o.map((v, axis) => v - heightsMm[i]! * n[axis]!) as Triple);
  const lean = leanOf(sideways, heightsMm, orientation, first, where, warnings);
  const numbers = stack.map((s) => s.acquired.instanceNumber);
  return { orientation, heightsMm, lean, ...stepOf(heightsMm, numbers, where, warnings) };
}

/** Summed in this order in Python, too, so that both have the same bits. */
export function along(v: Triple, direction: Triple): number {
  return v[0] * direction[0] + v[1] * direction[1] + v[2] * direction[2];
}

/** How far from an even grid a slice may lie and count as on it: what rounding of written positions does. */
export function evenToleranceMm(stepMm: number): number {
  return Math.max(EVEN_TOLERANCE * stepMm, Math.min(ROUNDED_MM, ROUNDED_SHARE * stepMm));
}

function cross(a: Triple, b: Triple): Triple {
  return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
}

/** Where cosines are written with two or three decimals, the positions say better where the slices are stacked; the
 * directions are turned to be across that. */
function acrossOf({ orientation, cosineRounding }: CtSlice, rise: Triple): [Triple, Triple] {
  if (cosineRounding === 0) return orientation;
  const length = Math.sqrt(along(rise, rise));
  const upward = rise.map((v) => v / length) as Triple;
  const n = normalOf(orientation);
  if (upward.some((v, i) => Math.abs(v - n[i]!) > 2 * cosineRounding)) return orientation;
  const off = along(orientation[0], upward);
  const rows = orientation[0].map((v, i) => v - off * upward[i]!) as Triple;
  const size = Math.sqrt(along(rows, rows));
  const unit = rows.map((v) => v / size) as Triple;
  return [unit, cross(upward, unit)];
}

/** Columns and rows a millimetre of height: 0 where the stack rises along the normal, else a tilted gantry's. */
function leanOf(sideways: Triple[], heights: number[], [row, column]: [Triple, Triple], first: CtSlice, where: string,
  warnings: string[]): Pair {
  const drifts = sideways.map((v) => Math.hypot(...v));
  const drift = Math.max(...drifts);
  const top = heights.at(-1)!;
  // Lean as a ratio, with room for rounding of the written positions.
  const straightMm = Math.max(SAME_DIRECTION * top, 0.1 * Math.min(...first.spacingMm));
  if (drift <= straightMm) return [0, 0];
  const lean = sideways.at(-1)!.map((v) => v / top) as Triple;
  const off = Math.max(...sideways.map((v, i) => Math.max(...v.map((s, axis) => Math.abs(s - heights[i]! * lean[axis]!)))));
  if (off > 0.5 * Math.min(...first.spacingMm)) {
    throw new AppError("MISALIGNED", where, `slices are shifted sideways by up to ${drift.toFixed(1)} mm`,
      "export the series again");
  }
  // Slices that are shifted to and fro by less than half a pixel do not lean.
  if (drifts.at(-1)! <= straightMm) return [0, 0];
  const tilt = (Math.atan(Math.hypot(...lean)) * 180) / Math.PI;
  if (tilt > MAX_TILT) {
    throw new AppError("GANTRY_TILT", where, `expected a gantry that is tilted by up to ${MAX_TILT} degrees, got `
      + `${tilt.toFixed(1)}: the stack is sheared`, "resample the series to a straight grid first");
  }
  warnings.push(`the gantry was tilted by ${tilt.toFixed(1)} degrees; resampled to a straight grid`);
  return [along(row, lean) / first.spacingMm[1], along(column, lean) / first.spacingMm[0]];
}

/** Millimetres between slices of an even grid, and whether the slices lie on it. */
function stepOf(heights: number[], numbers: (number | null)[], where: string, warnings: string[]
): { stepMm: number; isEven: boolean } {
  const gaps = heights.slice(1).map((h, i) => h - heights[i]!);
  const evenMm = evenStep(heights);
  if (evenMm !== null) return { stepMm: evenMm, isEven: true };
  demandComplete(heights, gaps, usualGap(gaps), numbers, where);
  const [least, most] = [Math.min(...gaps), Math.max(...gaps)];
  const spread = `slices are ${short(least)} to ${short(most)} mm apart`;
  if (most > MAX_UNEVEN * (1 + EVEN_TOLERANCE) * least + ROUNDED_GAP_MM) {
    throw new AppError("UNEVEN_SPACING", where, spread, "reconstruct the scan with even slices");
  }
  const blocks = blocksOf(gaps);
  // Of several blocks the thin one keeps its resolution.
  const stepMm = blocks.length > 1
    ? Math.min(...blocks.map(([begin, end]) => (heights[end]! - heights[begin]!) / (end - begin))) : median(gaps);
  warnings.push(`${spread}; resampled to ${short(stepMm)} mm`);
  return { stepMm, isEven: false };
}

/** Millimetres between even slices; null where they are uneven by more than their positions are rounded. */
function evenStep(heights: number[]): number | null {
  const last = heights.length - 1;
  const stepMm = heights[last]! / last;
  const offMm = Math.max(...heights.map((h, i) => Math.abs(h - stepMm * i)));
  if (offMm <= SAME_DIRECTION * stepMm) return stepMm;
  // The line that fits best, as the first and last position are rounded, too; sums in order, as Python's.
  const centred = heights.map((_, i) => i - last / 2);
  const fittedMm = sum(centred.map((c, i) => c * heights[i]!)) / sum(centred.map((c) => c * c));
  const middle = sum(heights) / heights.length;
  const offFittedMm = Math.max(...heights.map((h, i) => Math.abs(h - middle - fittedMm * centred[i]!)));
  return offMm <= EVEN_TOLERANCE * stepMm || offFittedMm <= evenToleranceMm(fittedMm) ? fittedMm : null;
}

/** How much a gap may differ from another one of the same spacing. */
function roundedMm(gapMm: number): number {
  return ROUNDED_GAP_MM + EVEN_TOLERANCE * gapMm;
}

/** The finest spacing that several gaps have; single ones may be wrong. */
function usualGap(gaps: number[]): number {
  const ordered = [...gaps].sort((a, b) => a - b);
  for (const gap of ordered) {
    const near = ordered.filter((g) => g >= gap && g <= gap + roundedMm(gap));
    if (near.length >= Math.max(2, MIN_SPACING_SHARE * gaps.length)) return sum(near) / near.length;
  }
  return median(gaps);
}

/** Where the stack is of blocks with a spacing each: the first gap of each, and the one behind its last. Empty where it
 * is not: between two blocks one gap may be of neither. */
function blocksOf(gaps: number[]): Pair[] {
  const runs: Pair[] = [];
  let begin = 0;
  for (let end = 1; end <= gaps.length; end++) {
    const usual = sum(gaps.slice(begin, end)) / (end - begin);
    if (end < gaps.length && Math.abs(gaps[end]! - usual) <= roundedMm(usual)) continue;
    runs.push([begin, end]);
    begin = end;
  }
  const blocks = runs.filter(([from, to]) => to - from >= MIN_BLOCK_GAPS);
  const between = gaps.length - sum(blocks.map(([from, to]) => to - from));
  return between <= blocks.length ? blocks : [];
}

/** Slices that were never measured, or were lost, are not made up: a few wide gaps, and many where each is a whole
 * multiple of the spacing, outside of blocks; InstanceNumber shows holes in a block, too. */
function demandComplete(heights: number[], gaps: number[], usual: number, numbers: (number | null)[], where: string) {
  const times = gaps.map((gap) => nearestEven(gap / usual));
  const wide = gaps.map((gap) => gap > MAX_GAP * usual);
  const holes = holesOf(numbers, wide, times);
  const blocks = blocksOf(gaps);
  const inBlock = gaps.map((_, i) => blocks.some(([begin, end]) => begin <= i && i < end));
  const isRare = wide.filter(Boolean).length <= MAX_GAP_SHARE * gaps.length;
  const lost = gaps.flatMap((gap, i) => {
    const whole = Math.abs(gap - times[i]! * usual) <= roundedMm(usual);
    return holes[i] || (wide[i] && !inBlock[i] && (whole || isRare)) ? [i] : [];
  });
  if (!lost.length) return;
  const listed = lost.slice(0, MAX_LISTED).map((i) => `${Math.max(1, times[i]! - 1)} after slice ${i + 1} at `
    + `${heights[i]!.toFixed(1)} mm`).join(", ");
  const more = lost.length > MAX_LISTED ? ` and ${lost.length - MAX_LISTED} more gaps` : "";
  const shown = lost.every((i) => holes[i]) ? ", where InstanceNumber has holes, too" : "";
  throw new AppError("MISSING_SLICES", where, `expected slices every ${short(usual)} mm, missing are ${listed}${more}`
    + shown, "export the series again, whole");
}

/** Wide gaps over which InstanceNumber jumps as far as the position does. */
function holesOf(numbers: (number | null)[], wide: boolean[], times: number[]): boolean[] {
  const none = wide.map(() => false);
  if (numbers.includes(null) || wide.every(Boolean)) return none;
  const jumps = numbers.slice(1).map((n, i) => n! - numbers[i]!);
  if (!jumps.every((j) => j > 0) && !jumps.every((j) => j < 0)) return none;
  const unit = median(jumps.map(Math.abs).filter((_, i) => !wide[i]));
  return wide.map((isWide, i) => isWide && Math.abs(jumps[i]!) === times[i]! * unit);
}

/** As NumPy's rint. */
function nearestEven(value: number): number {
  const below = Math.floor(value);
  return value - below > 0.5 || (value - below === 0.5 && below % 2 !== 0) ? below + 1 : below;
}

function sum(values: number[]): number {
  return values.reduce((total, v) => total + v, 0);
}

function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

function short(value: number): string {
  return String(Number(value.toPrecision(3)));
}
