/** From probabilities on the prepared grid to labels on the scan's own: `SlabRestorer` of `geometry/restore.py`, bit for bit. */
import type { Triple } from "./grid.ts";
import type { Slab } from "./patches.ts";
import { boxShape, type Undo } from "./preprocess.ts";
import { firstNotBelow, lerp, lerpPlane, rowsFirst, Taps, type Plane } from "./resample.ts";

const CLEAR_MARGIN = Math.fround(1e-5);

/** First row, row after the last, first column, column after the last; null where it is empty. */
type Rectangle = [number, number, number, number] | null;
type Range = [number, number];

/** One prepared slice of all classes [K, h, w], and where each organ is not clearly below background. */
interface Slice {
  probs: Float32Array;
  contested: Rectangle[];
}

/**
 * Takes probabilities slab by slab, lays them on the scan's grid and keeps the winner of each voxel.
 *
 * A class is interpolated only inside the rectangle where it is not clearly below background at the prepared voxels
 * around; elsewhere background beats it after any interpolation too, so the result is the same.
 */
export class SlabRestorer {
  private readonly labels: Uint8Array;
  /** Of the winner at each label's voxels, summed. */
  private readonly winning: Float64Array;
  private readonly counts: Float64Array;
  private readonly kept: Triple;
  private readonly z: Taps;
  private readonly y: Taps;
  private readonly x: Taps;
  private readonly yBeforeX: boolean;
  private readonly slices = new Map<number, Slice>();
  private nextPrepared = 0;
  private nextNative = 0;

  constructor(private readonly undo: Undo, private readonly numOutputs: number) {
    this.labels = new Uint8Array(undo.nativeShape.reduce((a, b) => a * b, 1));
    this.winning = new Float64Array(numOutputs);
    this.counts = new Float64Array(numOutputs);
    this.kept = boxShape(undo.box);
    [this.z, this.y, this.x] = this.kept.map((n, i) => Taps.between(undo.preparedShape[i]!, n)) as [Taps, Taps, Taps];
    this.yBeforeX = rowsFirst(undo.preparedShape, this.kept);
  }

  /** The next slices. */
  add({ values, depth }: Slab) {
    const plane = this.undo.preparedShape[1] * this.undo.preparedShape[2];
    for (let d = 0; d < depth; d++) {
      const probs = new Float32Array(this.numOutputs * plane);
      for (let k = 0; k < this.numOutputs; k++) {
        const from = (k * depth + d) * plane;
        probs.set(values.subarray(from, from + plane), k * plane);
      }
      this.slices.set(this.nextPrepared++, { probs, contested: this.contested(probs) });
      // Native slices are ready as soon as the upper one of their two neighbours is here.
      const ready = firstNotBelow(this.z.above, this.nextPrepared);
      while (this.nextNative < ready) this.restoreSlice(this.nextNative++);
    }
  }

  /** Labels on the scan's whole grid. */
  finish(): Uint8Array {
    if (this.nextPrepared !== this.undo.preparedShape[0]) {
      throw new RangeError(`expected ${this.undo.preparedShape[0]} slices in all, got ${this.nextPrepared}`);
    }
    return this.labels;
  }

  /** Mean probability of each label's voxels, 0 where it has none. */
  confidence(): number[] {
    return Array.from(this.winning, (sum, label) => (label && this.counts[label]! ? sum / this.counts[label]! : 0));
  }

  private contested(probs: Float32Array): Rectangle[] {
    const [, height, width] = this.undo.preparedShape;
    const plane = height * width;
    return Array.from({ length: this.numOutputs - 1 }, (_, organ) => {
      let found: Rectangle = null;
      for (let y = 0, i = 0; y < height; y++) {
        for (let x = 0; x < width; x++, i++) {
          if (!(probs[(organ + 1) * plane + i]! >= Math.fround(probs[i]! - CLEAR_MARGIN))) continue;
          if (!found) found = [y, y + 1, x, x + 1];
          found[1] = y + 1;
          if (x < found[2]) found[2] = x;
          if (x >= found[3]) found[3] = x + 1;
        }
      }
      return found;
    });
  }

  private restoreSlice(nativeZ: number) {
    const [below, above] = [this.z.below[nativeZ]!, this.z.above[nativeZ]!];
    for (const index of this.slices.keys()) if (index < below) this.slices.delete(index);
    const [a, b, weight] = [this.slices.get(below)!, this.slices.get(above)!, this.z.weight[nativeZ]!];
    const contested = a.contested.map((r, k) => union(r, b.contested[k]!));
    const [rows, columns] = this.nativeRange(contested.reduce(union, null));
    if (rows[0] === rows[1] || columns[0] === columns[1]) return;
    const best = this.interpolated(a, b, 0, weight, rows, columns);
    const labels = new Uint8Array(best.values.length);
    contested.forEach((rectangle, organ) => {
      const [kRows, kColumns] = this.nativeRange(rectangle);
      if (kRows[0] === kRows[1] || kColumns[0] === kColumns[1]) return;
      const probs = this.interpolated(a, b, organ + 1, weight, kRows, kColumns);
      for (let y = 0, i = 0; y < probs.height; y++) {
        let at = (kRows[0] - rows[0] + y) * best.width + kColumns[0] - columns[0];
        for (let x = 0; x < probs.width; x++, i++, at++) {
          if (!(probs.values[i]! > best.values[at]!)) continue;
          best.values[at] = probs.values[i]!;
          labels[at] = organ + 1;
        }
      }
    });
    labels.forEach((label, i) => {
      this.winning[label]! += best.values[i]!;
      this.counts[label]!++;
    });
    this.place(labels, best, nativeZ, rows[0], columns[0]);
  }

  private place(labels: Uint8Array, { height, width }: Plane, nativeZ: number, row: number, column: number) {
    const [, ny, nx] = this.undo.nativeShape;
    const [z0, y0, x0] = this.undo.box.start;
    for (let y = 0; y < height; y++) {
      const to = ((z0 + nativeZ) * ny + y0 + row + y) * nx + x0 + column;
      this.labels.set(labels.subarray(y * width, (y + 1) * width), to);
    }
  }

  /** Native rows and columns whose interpolation touches the prepared rectangle. */
  private nativeRange(r: Rectangle): [Range, Range] {
    return r ? [this.y.reachedBy(r[0], r[1]), this.x.reachedBy(r[2], r[3])] : [[0, 0], [0, 0]];
  }

  /** One class between two prepared slices, on native `rows` and `columns`; never a view of either. */
  private interpolated(a: Slice, b: Slice, k: number, weight: number, rows: Range, columns: Range): Plane {
    const [, height, width] = this.undo.preparedShape;
    const [y, x] = [this.y.part(...rows), this.x.part(...columns)];
    const [y0, y1] = [y.below[0]!, y.above.at(-1)! + 1];
    const [x0, x1] = [x.below[0]!, x.above.at(-1)! + 1];
    const part: Plane = { values: new Float32Array((y1 - y0) * (x1 - x0)), height: y1 - y0, width: x1 - x0 };
    for (let row = y0; row < y1; row++) {
      const from = k * height * width + row * width;
      const to = (row - y0) * part.width;
      lerp(a.probs.subarray(from + x0, from + x1), b.probs.subarray(from + x0, from + x1), weight,
        part.values.subarray(to, to + part.width));
    }
    return lerpPlane(part, y.moved(y0), x.moved(x0), this.yBeforeX);
  }
}

function union(a: Rectangle, b: Rectangle): Rectangle {
  if (!a || !b) return a ?? b;
  return [Math.min(a[0], b[0]), Math.max(a[1], b[1]), Math.min(a[2], b[2]), Math.max(a[3], b[3])];
}
