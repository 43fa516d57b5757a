/** The browser's reading, preparing, stitching and restoring against what Python wrote (`make_vectors.py`). */
import { createHash } from "node:crypto";
import { openAsBlob, readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { findBody } from "../src/core/body.ts";
import { AppError } from "../src/core/errors.ts";
import { inflatedNifti } from "../src/core/inflate.ts";
import { budgetBytes, demandFits, estimateBytes } from "../src/core/memory.ts";
import { describedModel } from "../src/core/model.ts";
import { parseHeader, readNifti, type Volume } from "../src/core/nifti.ts";
import { labelsNifti } from "../src/core/niftiWrite.ts";
import { gaussianImportance, gridStarts } from "../src/core/patches.ts";
import { planGrid, prepareCt, roundHalfEven } from "../src/core/preprocess.ts";
import { prepare, segmentPrepared } from "../src/core/segment.ts";

const folder = new URL("./vectors/", import.meta.url);
const vectors = JSON.parse(readFileSync(new URL("vectors.json", folder), "utf8"));
const digest = (array: Float32Array | Uint8Array) =>
  createHash("sha256").update(new Uint8Array(array.buffer, array.byteOffset, array.byteLength)).digest("hex");

async function read(name: string): Promise<Volume> {
  const file = await openAsBlob(new URL(name, folder));
  return readNifti(await inflatedNifti(file, name, () => undefined), name);
}

describe("reading", () => {
  it.each(vectors.reading)("$file as Python reads it", async (row: any) => {
    const volume = await read(row.file);
    expect(volume.shape).toEqual(row.shape);
    volume.affine.forEach((v, i) => expect(v).toBeCloseTo(row.affine[i], 9));
    volume.spacingMm.forEach((v, i) => expect(v).toBeCloseTo(row.spacing[i], 9));
    expect(digest(volume.voxels)).toBe(row.voxels);
    expect(volume.warnings.length).toBe(row.warnings.length);
    const labels = Uint8Array.from(volume.voxels, (hu) => (hu > 0 ? 1 : 0));
    const organs = ["one", 'Größe "2"'].map((name, i) => ({ value: i + 1, name, rgb: [0, 0, 0] as [0, 0, 0], snomed: null }));
    expect(digest(labelsNifti(labels, volume.source, volume.raw, organs))).toBe(row.written);
  });

  it.each(vectors.refused)("$file is refused as $code", async (row: any) => {
    const error = await read(row.file).then(() => null, (e: unknown) => e);
    expect(error).toBeInstanceOf(AppError);
    // The stream of a browser does not say more of damaged gzip than that it is damaged.
    const codes = row.file.includes("gzip") ? ["CRC"] : [row.code];
    expect(codes).toContain((error as AppError).code);
  });
});

describe("windows", () => {
  it.each(vectors.grids)("of $patch over $shape", (row: any) => {
    const starts = gridStarts(row.shape, row.patch, row.overlap);
    [0, 1, 2].forEach((axis) => expect([...new Set(starts.map((s) => s[axis]))]).toEqual(row.starts[axis]));
    expect(starts.length).toBe(row.starts.reduce((n: number, s: number[]) => n * s.length, 1));
  });

  it("weigh their middle most", () => {
    const weights = gaussianImportance(vectors.importance.patch);
    vectors.importance.weights.forEach((w: number, i: number) => expect(weights[i]).toBeCloseTo(w, 7));
  });

  it("rounds halves as Python does", () => {
    expect([0.5, 1.5, 2.5, 3.4999, 3.5001, 7].map(roundHalfEven)).toEqual([0, 2, 2, 3, 4, 7]);
  });
});

describe("the whole way", () => {
  it.each(vectors.cases)("on $file", async (row: any) => {
    const model = describedModel(row.model);
    const volume = await read(row.file);
    const box = findBody(volume.voxels, volume.shape, volume.spacingMm);
    expect([box.start, box.stop]).toEqual(row.box);
    const undo = planGrid(volume.voxels, volume.shape, volume.spacingMm, model);
    expect(undo.preparedShape).toEqual(row.prepared_shape);
    expect(digest(prepareCt(volume.voxels, undo, model))).toBe(row.prepared);
    const steps: number[] = [];
    const { labels, confidence } = await segmentPrepared(prepare(volume.voxels, volume.shape, volume.spacingMm, model), model,
      async (window) => bands(window, model.patch[2]), (done) => steps.push(done));
    const counts = [0, 1, 2, 3].map((k) => labels.reduce((n, v) => n + (v === k ? 1 : 0), 0));
    expect(counts).toEqual(row.counts);
    expect(digest(labels)).toBe(row.labels);
    [0, 1, 2, 3].forEach((k) => expect(confidence[k]).toBeCloseTo(row.confidence[k], 6));
    expect(steps).toEqual(steps.map((_, i) => i + 1));
  });

  it("stops where the network returns no numbers", async () => {
    const row = vectors.cases[0];
    const volume = await read(row.file);
    const model = describedModel(row.model);
    const prepared = prepare(volume.voxels, volume.shape, volume.spacingMm, model);
    await expect(segmentPrepared(prepared, model, async (w) => new Float32Array(4 * w.length).fill(NaN),
      () => undefined)).rejects.toMatchObject({ code: "NONFINITE" });
  });
});

describe("the body", () => {
  it("is found among more parts than a call takes arguments", () => {
    const shape: [number, number, number] = [200, 200, 200];
    const voxels = new Float32Array(200 ** 3).fill(-1000);
    // Crosses of seven voxels survive the opening, each a part of its own.
    for (let z = 1; z < 199; z += 3) for (let y = 1; y < 199; y += 3) for (let x = 1; x < 199; x += 3) {
      const i = (z * 200 + y) * 200 + x;
      for (const step of [0, 1, -1, 200, -200, 40000, -40000]) voxels[i + step] = 0;
    }
    expect(findBody(voxels, shape, [4, 4, 4])).toEqual({ start: [0, 0, 0], stop: [200, 200, 200] });
  });
});

describe("a foreign model", () => {
  it("overlaps its windows by nine tenths at most", () => {
    const model = structuredClone(vectors.cases[0].model);
    model.use.overlap = 0.9;
    expect(describedModel(model).overlap).toBe(0.9);
    for (const overlap of [0.91, 1, -0.1]) {
      model.use.overlap = overlap;
      expect(() => describedModel(model)).toThrow(/expected an overlap of 0 to 0.9, got/);
    }
  });
});

describe("memory", () => {
  const model = describedModel(vectors.cases[0].model);

  it("is refused in words before anything is allocated", async () => {
    const whole = new Uint8Array(await inflatedNifti(await openAsBlob(new URL("RAS_int16.nii.gz", folder)), "x",
      () => undefined));
    const header = { ...parseHeader(whole, "x"), fileBytes: whole.length };
    demandFits(header, model, budgetBytes(4), "small.nii");
    const large = { ...header, shape: [1024, 1024, 1500] as [number, number, number] };
    expect(estimateBytes(large, model)).toBeGreaterThan(8e9);
    expect(() => demandFits(large, model, budgetBytes(8), "large.nii")).toThrow(/needs about .* GiB.*can give 4.0 GiB/);
  });
});

/** The network of `make_vectors.py`. */
function bands(window: Float32Array, width: number): Float32Array {
  const n = window.length;
  const f = Math.fround;
  const probs = new Float32Array(4 * n);
  for (let i = 0; i < n; i++) {
    const v = window[i]!;
    probs[i] = 0.3;
    probs[n + i] = v * (i % width < Math.floor(width / 2) ? 0.75 : 1);
    probs[2 * n + i] = 0.5 - f(v * v);
    probs[3 * n + i] = -0.5 * v;
  }
  return probs;
}
