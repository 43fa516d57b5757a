/**
 * Linear interpolation between two grids that cover the same extent, slice by slice; the counterpart of `geometry/resample.py`.
 *
 * Every step is rounded to float32 as NumPy rounds it, so that both give the same bits.
 */
import type { Triple } from "./grid.ts";

const f = Math.fround;

/** Linear interpolation along one axis: out = source[below] + (source[above] - source[below]) * weight. */
export class Taps {
  private constructor(
    readonly below: Int32Array,
    readonly above: Int32Array,
    readonly weight: Float32Array,
    readonly identity: boolean,
  ) {}

  /** From n voxels to m over the same extent, half-pixel aligned, the border value beyond the outer centres. */
  static between(n: number, m: number): Taps {
    const [below, above, weight] = [new Int32Array(m), new Int32Array(m), new Float32Array(m)];
    for (let i = 0; i < m; i++) {
      const at = Math.min(Math.max((i + 0.5) * (n / m) - 0.5, 0), n - 1);
      below[i] = Math.trunc(at);
      above[i] = n === m ? below[i]! : Math.min(below[i]! + 1, n - 1);
      weight[i] = at - below[i]!;
    }
    return new Taps(below, above, weight, n === m);
  }

  part(start: number, stop: number): Taps {
    return new Taps(this.below.subarray(start, stop), this.above.subarray(start, stop),
      this.weight.subarray(start, stop), this.identity);
  }

  /** For a source that begins at `offset`. */
  moved(offset: number): Taps {
    return new Taps(this.below.map((i) => i - offset), this.above.map((i) => i - offset), this.weight, this.identity);
  }

  /** The outputs that use any source in start..stop. */
  reachedBy(start: number, stop: number): [number, number] {
    return start === stop ? [0, 0] : [firstNotBelow(this.above, start), firstNotBelow(this.below, stop)];
  }
}

/** The first index whose value is not below `value`, in sorted numbers. */
export function firstNotBelow(sorted: Int32Array, value: number): number {
  const index = sorted.findIndex((v) => v >= value);
  return index < 0 ? sorted.length : index;
}

export interface Plane {
  values: Float32Array;
  height: number;
  width: number;
}

/** a + (b - a) * weight, which keeps constants exactly. */
export function lerp(a: Float32Array, b: Float32Array, weight: number, out: Float32Array) {
  for (let i = 0; i < out.length; i++) out[i] = f(f(f(b[i]! - a[i]!) * weight) + a[i]!);
}

/** Whether interpolating y before x leaves the smaller plane between the two. */
export function rowsFirst(old: Triple, wish: Triple): boolean {
  return wish[1] * old[2] <= old[1] * wish[2];
}

/** A plane at the places of the taps. */
export function lerpPlane(plane: Plane, y: Taps, x: Taps, yBeforeX: boolean): Plane {
  return yBeforeX ? lerpColumns(lerpRows(plane, y), x) : lerpRows(lerpColumns(plane, x), y);
}

function lerpRows(plane: Plane, taps: Taps): Plane {
  if (taps.identity) return plane;
  const { values, width } = plane;
  const height = taps.below.length;
  const out = new Float32Array(height * width);
  for (let j = 0, to = 0; j < height; j++) {
    const [below, above, w] = [taps.below[j]! * width, taps.above[j]! * width, taps.weight[j]!];
    for (let i = 0; i < width; i++, to++) {
      const low = values[below + i]!;
      out[to] = f(low + f(f(values[above + i]! - low) * w));
    }
  }
  return { values: out, height, width };
}

function lerpColumns(plane: Plane, taps: Taps): Plane {
  if (taps.identity) return plane;
  const { values, height } = plane;
  const width = taps.below.length;
  const out = new Float32Array(height * width);
  for (let j = 0, to = 0; j < height; j++) {
    const row = j * plane.width;
    for (let i = 0; i < width; i++, to++) {
      const low = values[row + taps.below[i]!]!;
      out[to] = f(low + f(f(values[row + taps.above[i]!]! - low) * taps.weight[i]!));
    }
  }
  return { values: out, height, width };
}
