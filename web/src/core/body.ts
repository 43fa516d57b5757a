/** The cuboid around the patient: `find_body` of `geometry/preprocess.py`, number for number. */
import type { Triple } from "./grid.ts";

const COARSE_MM = 5;
const PART_MM3 = 10_000;
const LUNG_MEAN_HU = -950;
const MARGIN_MM = 10;
const THRESHOLD_HU = -300;

/** A cuboid of voxels: `start` lies inside, `stop` outside, both (z, y, x). */
export interface Box {
  start: Triple;
  stop: Triple;
}

interface Grid {
  values: Uint8Array;
  shape: Triple;
}

/** A box inside the volume; the whole volume where nothing is found. */
export function findBody(voxels: Float32Array, shape: Triple, spacingMm: Triple): Box {
  const steps = spacingMm.map((mm) => Math.max(1, Math.trunc(COARSE_MM / mm))) as Triple;
  const coarseShape = shape.map((n, i) => Math.ceil(n / steps[i]!)) as Triple;
  const coarse = everyFew(voxels, shape, steps, coarseShape);
  const body: Grid = { values: Uint8Array.from(coarse, (hu) => (hu > THRESHOLD_HU ? 1 : 0)), shape: coarseShape };
  addLungs(coarse, body);
  const parts = labelled(dilated(eroded(body)));
  const whole: Box = { start: [0, 0, 0], stop: [...shape] };
  if (parts.sizes.length === 0) return whole;
  const voxelMm3 = steps.reduce((product, step, i) => product * (step * spacingMm[i]!), 1);
  const largest = parts.sizes.reduce((a, b) => Math.max(a, b));
  const smallest = Math.min(largest, PART_MM3 / voxelMm3);
  const { start, stop } = cuboidOf(parts, smallest, coarseShape);
  const margins = spacingMm.map((mm) => Math.ceil(MARGIN_MM / mm));
  return {
    // The body may end anywhere between the last coarse voxel inside and the first outside.
    start: start.map((a, i) => Math.max(0, a * steps[i]! - (steps[i]! - 1) - margins[i]!)) as Triple,
    stop: stop.map((b, i) => Math.min(shape[i]!, b * steps[i]! + margins[i]!)) as Triple,
  };
}

function everyFew(voxels: Float32Array, shape: Triple, steps: Triple, [nz, ny, nx]: Triple): Float32Array {
  const out = new Float32Array(nz * ny * nx);
  let to = 0;
  for (let z = 0; z < nz; z++) {
    for (let y = 0; y < ny; y++) {
      const row = (z * steps[0] * shape[1] + y * steps[1]) * shape[2];
      for (let x = 0; x < nx; x++) out[to++] = voxels[row + x * steps[2]]!;
    }
  }
  return out;
}

/** Connected regions of low density that are too dense on average to be outside air. */
function addLungs(coarse: Float32Array, body: Grid) {
  const thin = labelled({ values: body.values.map((v) => 1 - v), shape: body.shape });
  const total = new Float64Array(thin.sizes.length);
  for (let i = 0; i < coarse.length; i++) {
    const region = thin.regions[i]!;
    if (region) total[region - 1]! += coarse[i]!;
  }
  for (let i = 0; i < coarse.length; i++) {
    const region = thin.regions[i]!;
    if (region && total[region - 1]! > LUNG_MEAN_HU * thin.sizes[region - 1]!) body.values[i] = 1;
  }
}

/** What lies beyond the border counts as body: a single slice or a close-up must survive it. */
function eroded(grid: Grid): Grid {
  return moved(grid, 1, (here, beside) => here & beside);
}

function dilated(grid: Grid): Grid {
  return moved(grid, 0, (here, beside) => here | beside);
}

/** Each voxel joined with its six neighbours. */
function moved({ values, shape }: Grid, beyond: number, join: (here: number, beside: number) => number): Grid {
  const [nz, ny, nx] = shape;
  const out = new Uint8Array(values.length);
  let i = 0;
  for (let z = 0; z < nz; z++) {
    for (let y = 0; y < ny; y++) {
      for (let x = 0; x < nx; x++, i++) {
        let v = values[i]!;
        v = join(v, z > 0 ? values[i - ny * nx]! : beyond);
        v = join(v, z < nz - 1 ? values[i + ny * nx]! : beyond);
        v = join(v, y > 0 ? values[i - nx]! : beyond);
        v = join(v, y < ny - 1 ? values[i + nx]! : beyond);
        v = join(v, x > 0 ? values[i - 1]! : beyond);
        out[i] = join(v, x < nx - 1 ? values[i + 1]! : beyond);
      }
    }
  }
  return { values: out, shape };
}

interface Parts {
  /** 0 outside, else the region's number from 1. */
  regions: Int32Array;
  sizes: number[];
}

/** The regions that hang together over faces. */
function labelled({ values, shape: [nz, ny, nx] }: Grid): Parts {
  const regions = new Int32Array(values.length);
  const sizes: number[] = [];
  const stack = new Int32Array(values.length);
  for (let seed = 0; seed < values.length; seed++) {
    if (!values[seed] || regions[seed]) continue;
    const region = sizes.length + 1;
    let [depth, size] = [0, 0];
    const visit = (i: number) => {
      if (!values[i] || regions[i]) return;
      regions[i] = region;
      stack[depth++] = i;
    };
    visit(seed);
    while (depth > 0) {
      const i = stack[--depth]!;
      size++;
      const x = i % nx;
      const y = Math.trunc(i / nx) % ny;
      const z = Math.trunc(i / (nx * ny));
      if (x > 0) visit(i - 1);
      if (x < nx - 1) visit(i + 1);
      if (y > 0) visit(i - nx);
      if (y < ny - 1) visit(i + nx);
      if (z > 0) visit(i - nx * ny);
      if (z < nz - 1) visit(i + nx * ny);
    }
    sizes.push(size);
  }
  return { regions, sizes };
}

/** Around all regions of at least `smallest` coarse voxels. */
function cuboidOf({ regions, sizes }: Parts, smallest: number, [, ny, nx]: Triple): Box {
  const start: Triple = [Infinity, Infinity, Infinity];
  const stop: Triple = [0, 0, 0];
  for (let i = 0; i < regions.length; i++) {
    const region = regions[i]!;
    if (!region || sizes[region - 1]! < smallest) continue;
    const at = [Math.trunc(i / (nx * ny)), Math.trunc(i / nx) % ny, i % nx];
    for (const axis of [0, 1, 2]) {
      start[axis] = Math.min(start[axis]!, at[axis]!);
      stop[axis] = Math.max(stop[axis]!, at[axis]! + 1);
    }
  }
  return { start, stop };
}
