/** DICOM series and every orientation, against what Python wrote (`make_dicom_vectors.py`). */
import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { deflateRawSync, gunzipSync } from "node:zlib";
import { describe, expect, it } from "vitest";
import { asAcquired } from "../src/core/acquired.ts";
import { ChoiceError } from "../src/core/dicomChoice.ts";
import { cielab } from "../src/core/dicomCodes.ts";
import { dicomSeg } from "../src/core/dicomSeg.ts";
import { readSeries, type DicomScan, type Source } from "../src/core/dicomSeries.ts";
import { sourceSeries } from "../src/core/dicomSource.ts";
import { AppError } from "../src/core/errors.ts";
import { columnLengths, fromCanonical } from "../src/core/grid.ts";
import { readNifti } from "../src/core/nifti.ts";
import { labelsNifti } from "../src/core/niftiWrite.ts";
import type { Organ } from "../src/core/model.ts";
import { jpeg2000Of } from "../src/jpeg2000.ts";
import { sha256Hex } from "../src/core/sha256.ts";
import { zipMembers } from "../src/core/zip.ts";

const folder = new URL("./vectors/", import.meta.url);
const pool = new Uint8Array(gunzipSync(readFileSync(new URL("dicom.bin.gz", folder))));
const vectors = JSON.parse(readFileSync(new URL("dicom.json", folder), "utf8"));
/** Where the objects go that Python then reads (tests/web/test_web.py). */
const OUT = process.env.AUTOSAM3D_WEB_OUT;
const wasm = new URL("../node_modules/@cornerstonejs/codec-openjpeg/dist/openjpegwasm_decode.wasm", import.meta.url);
const openJpeg = jpeg2000Of(new Uint8Array(readFileSync(wasm)));
const jpeg2000 = () => openJpeg;
const digest = (array: Float32Array | Uint8Array) =>
  createHash("sha256").update(new Uint8Array(array.buffer, array.byteOffset, array.byteLength)).digest("hex");

type Row = { name: string; files: [string, number, number][]; code?: string; shape: number[]; affine: number[];
  voxels: string; acquired?: string; warnings: string[] };
const bytesOf = ([, at, size]: [string, number, number]) => pool.slice(at, at + size);
const row = (name: string): Row => vectors.series.find((r: Row) => r.name === name);

function sources({ files }: Row): Source[] {
  return files.map((file) => ({ name: file[0], size: file[2], isLink: false,
    read: async (limit) => bytesOf(file).subarray(0, limit) }));
}

function read(given: Source[], series?: string): Promise<DicomScan> {
  return readSeries(given, { where: "scan", series, admit: () => undefined, progress: () => undefined, jpeg2000 });
}

/** As in `make_dicom_vectors.py` and tests/web/test_web_dicom.py. */
const labelled = ({ voxels }: DicomScan) => Uint8Array.from(voxels, (hu) => (hu > 900 ? 3 : hu > 100 ? 2 : hu > 0 ? 1 : 0));

const refused = vectors.series.filter((r: Row) => r.code);
const sound = vectors.series.filter((r: Row) => !r.code);

describe("series", () => {
  it.each(sound as Row[])("$name as Python reads it", async (r) => {
    const scan = await read(sources(r));
    expect(scan.shape).toEqual(r.shape);
    scan.affine.forEach((v, i) => expect(v).toBeCloseTo(r.affine[i]!, 6));
    expect(digest(scan.voxels)).toBe(r.voxels);
    // Python sees links; here only a zip has any.
    expect(scan.warnings).toEqual(r.warnings.filter((text) => !text.includes("link")));
  });

  it.each((sound as Row[]).filter((r) => r.acquired))("$name gives labels back to its own slices as Python does", async (r) => {
    const scan = await read(sources(r));
    const planes = asAcquired(fromCanonical(labelled(scan), scan.source), scan.source);
    expect(planes.length).toBe(20 * 24 * scan.images.length);
    expect(digest(planes)).toBe(r.acquired);
    expect(scan.warnings.join()).toContain("resampled to");
  });

  it.each((sound as Row[]).filter((r) => /^(00_good|52|53)/.test(r.name)))("$name is admitted with all that it takes", async (r) => {
    let told: [number[], number[], number] | null = null;
    const admit = (...what: [number[], number[], number]) => { told = what; };
    const scan = await readSeries(sources(r), { where: "scan", admit, progress: () => undefined, jpeg2000 });
    const [shape, affine, bytes] = told!;
    expect(shape).toEqual(scan.source.shape);
    expect(columnLengths(affine)).toEqual(columnLengths(scan.source.affine));
    const largest = Math.max(...r.files.map(([, , size]) => size));
    expect(bytes).toBe(largest + (r.acquired ? 4 * 20 * 24 * r.files.length : 0));
    const refuse = () => { throw new AppError("MEMORY", "scan", "too large", "crop it"); };
    let reads = 0;
    const given = sources(r).map((s) => ({ ...s, read: (limit: number) => (reads++, s.read(limit)) }));
    await expect(readSeries(given, { where: "scan", admit: refuse, progress: () => undefined, jpeg2000 }))
      .rejects.toMatchObject({ code: "MEMORY" });
    // The start of each file and its tags, no pixels.
    expect(reads).toBe(2 * r.files.length);
  });

  it("of a gantry that leans as none does is refused with the words of Python", async () => {
    await expect(read(sources(row("52_beyond_gantries")))).rejects.toThrow(/up to 35 degrees, got 40\.0: the stack is sheared/);
  });

  it.each(refused as Row[])("$name is refused as $code", async (r) => {
    const error = await read(sources(r)).then(() => null, (e: unknown) => e);
    expect(error).toBeInstanceOf(AppError);
    expect((error as AppError).code).toBe(r.code);
    expect((error as AppError).message).not.toMatch(/Doe|4711|\n/);
  });

  it("are listed to choose from, and the chosen one is read", async () => {
    const given = sources(row("50_two_series"));
    const error = (await read(given).catch((e: unknown) => e)) as ChoiceError;
    expect(error).toBeInstanceOf(ChoiceError);
    expect(error.choices.map((c) => [c.slices, c.rows, c.columns, c.title]).sort())
      .toEqual([[10, 20, 24, "Doe series"], [12, 20, 24, "Doe series"]]);
    const key = error.choices.find((c) => c.slices === 12)!.key;
    expect(digest((await read(given, key)).voxels)).toBe(row("00_good").voxels);
    await expect(read(given, "nowhere")).rejects.toMatchObject({ code: "SERIES_CHOICE" });
  });

  const spoiled: [string, number, number, number][] = [["00_good", 132, 960, 300], ["jpeg 2000 unsigned", 1020, 10, 60]];
  it.each(spoiled)("%s with spoiled bytes is read or refused, and never crashes", async (name, first, behind, times) => {
    let [seed, refusals] = [1, 0];
    const random = (n: number) => (seed = (seed * 48271) % 2147483647) % n;
    for (let i = 0; i < times; i++) {
      const given = sources(row(name));
      const hurt = await given[5]!.read(1e9);
      for (let k = 0; k < 3; k++) hurt[first + random(hurt.length - first - behind)] = random(256);
      given[5] = { ...given[5]!, read: async (limit) => hurt.subarray(0, limit) };
      const error = await read(given).then(() => null, (e: unknown) => e);
      if (error === null) continue;
      expect(error, String(error)).toBeInstanceOf(AppError);
      refusals++;
    }
    expect(refusals).toBeGreaterThan(times / 10);
  });

  it("of JPEG 2000 are refused where a codestream is cut, though OpenJPEG would guess the rest", async () => {
    const bytes = bytesOf(row("jpeg 2000 unsigned").files[5]!);
    const starts = bytes.findIndex((v, i) => v === 0xff && bytes[i + 1] === 0x4f && bytes[i + 2] === 0xff);
    const stream = bytes.slice(starts, bytes.findLastIndex((v, i) => v === 0xff && bytes[i + 1] === 0xd9) + 2);
    const decode = await jpeg2000();
    expect(decode(stream, 20, 24)?.values.length).toBe(480);
    expect(decode(stream, 24, 20)).toBeNull();
    const cut = Uint8Array.from([...stream.subarray(0, stream.length - 60), 0xff, 0xd9]);
    for (const less of [cut, stream.subarray(0, 60), stream.subarray(0, 150), stream.subarray(0, stream.length - 2)]) {
      expect(decode(less, 20, 24)).toBeNull();
    }
  });
});

describe("all orientations of NIfTI", () => {
  it.each(vectors.niftis as Row[])("$name as Python reads it", (r) => {
    const volume = readNifti(bytesOf(r.files[0]!), r.name);
    expect(volume.shape).toEqual(r.shape);
    volume.affine.forEach((v, i) => expect(v).toBeCloseTo(r.affine[i]!, 9));
    expect(digest(volume.voxels)).toBe(r.voxels);
  });
});

/** A zip of these members as tools write it; `spoil` changes its bytes. */
function zipped(files: [string, Uint8Array, number?][], spoil: (zip: Uint8Array) => void = () => undefined): Blob {
  const [parts, entries]: [Buffer[], Buffer[]] = [[], []];
  let at = 0;
  for (const [name, bytes, mode] of files) {
    const packed = deflateRawSync(bytes);
    const crc = crcOf(bytes);
    const head = Buffer.alloc(30);
    [[0, 0x04034b50], [14, crc], [18, packed.length], [22, bytes.length]].forEach(([p, v]) => head.writeUInt32LE(v!, p!));
    head.writeUInt16LE(8, 8);
    head.writeUInt16LE(Buffer.byteLength(name), 26);
    const entry = Buffer.alloc(46);
    [[0, 0x02014b50], [16, crc], [20, packed.length], [24, bytes.length], [38, (mode ?? 0) * 65536], [42, at]]
      .forEach(([p, v]) => entry.writeUInt32LE(v! >>> 0, p!));
    entry.writeUInt16LE(8, 10);
    entry.writeUInt16LE(Buffer.byteLength(name), 28);
    parts.push(head, Buffer.from(name), packed);
    entries.push(entry, Buffer.from(name));
    at += 30 + Buffer.byteLength(name) + packed.length;
  }
  const directory = Buffer.concat(entries);
  const end = Buffer.alloc(22);
  end.writeUInt32LE(0x06054b50, 0);
  end.writeUInt16LE(files.length, 10);
  end.writeUInt32LE(directory.length, 12);
  end.writeUInt32LE(at, 16);
  const whole = new Uint8Array(Buffer.concat([...parts, directory, end]));
  spoil(whole);
  return new Blob([whole]);
}

function crcOf(bytes: Uint8Array): number {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let k = 0; k < 8; k++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

describe("zip files", () => {
  const good = row("00_good").files.map((f): [string, Uint8Array, number?] => [`../../ct/${f[0]}`, bytesOf(f)]);
  const at = (zip: Uint8Array, magic: number) => {
    const view = new DataView(zip.buffer);
    for (let i = 0; ; i++) if (view.getUint32(i, true) === magic) return i;
  };
  const code = (blob: Blob) => zipMembers(blob, "x.zip").then((members) => read(members))
    .then(() => "read", (e: unknown) => (e as AppError).code);

  it("hold series, whatever their names climb to; links are left out", async () => {
    const link: [string, Uint8Array, number] = ["link", new TextEncoder().encode("/etc/passwd"), 0o120777];
    const scan = await read(await zipMembers(zipped([...good, link]), "x.zip"));
    expect(digest(scan.voxels)).toBe(row("00_good").voxels);
    expect(scan.warnings).toEqual(["left out: 1 link"]);
  });

  it("are refused where they are cut, damaged, encrypted, bombs or too many files", async () => {
    expect(await code(zipped(good).slice(0, 5000))).toBe("ARCHIVE_DAMAGED");
    expect(await code(zipped(good, (z) => z.fill(0x55, 60, 300)))).toBe("ARCHIVE_DAMAGED");
    expect(await code(zipped(good, (z) => new DataView(z.buffer).setUint32(at(z, 0x02014b50) + 16, 1, true)))).toBe("ARCHIVE_DAMAGED");
    expect(await code(zipped(good, (z) => { z[at(z, 0x02014b50) + 8] = 1; }))).toBe("ARCHIVE_ENCRYPTED");
    expect(await code(zipped(good, (z) => z.fill(0xff, at(z, 0x06054b50) + 10, at(z, 0x06054b50) + 12)))).toBe("ARCHIVE_DAMAGED");
    // Claims of 4 GiB a member; and a member that is larger than it claims.
    const claim = (size: number) => (z: Uint8Array) => new DataView(z.buffer).setUint32(at(z, 0x02014b50) + 24, size, true);
    expect(await code(zipped(good, claim(0xfffffff0)))).toBe("LENGTH");
    expect(await code(zipped(good, claim(700)))).toBe("ARCHIVE_DAMAGED");
    const bomb: [string, Uint8Array] = ["bomb.dcm", new Uint8Array(1 << 24)];
    expect(await code(zipped([...good, bomb]))).toBe("read");
    expect(await code(zipped([["notes.txt", new TextEncoder().encode("no scan")]]))).toBe("NO_DICOM");
  });
});

describe("SHA-256", () => {
  it.each([0, 3, 55, 56, 63, 64, 65, 119, 120, 1000])("of %i bytes", (n) => {
    const bytes = Uint8Array.from({ length: n }, (_, i) => i * 7);
    expect(sha256Hex(bytes)).toBe(createHash("sha256").update(bytes).digest("hex"));
  });
});

describe("DICOM SEG", () => {
  const organs: Organ[] = [
    { value: 1, name: "liver", rgb: [165, 85, 50], snomed: "10200004" },
    { value: 2, name: "parotid_left", rgb: [89, 196, 120], snomed: "45289007" },
    { value: 3, name: "my^own\\organ", rgb: [1, 2, 3], snomed: null },
    { value: 4, name: "aorta", rgb: [230, 20, 30], snomed: "15825003" },
  ];
  const by = { name: "autosam3d test", version: "1.2.3", sha256: "ab".repeat(32) };

  it.each((sound as Row[]).filter((r) => !/no_uids/.test(r.name)))("of $name", async (r) => {
    const scan = await read(sources(r));
    const labels = labelled(scan);
    const first = await scan.images[0]!.source.read(1e9);
    const series = sourceSeries(scan.images.map((i) => i.slice), first, scan.source, "scan");
    const made = () => dicomSeg(labels, scan.source, series, organs, by, new Date(0))!;
    expect(digest(made())).toBe(digest(made()));
    expect(series.warnings.length).toBe(r.name === "69_wrong_texts" ? 1 : 0);
    if (!OUT) return;
    const to = `${OUT}/${r.name}`;
    mkdirSync(`${to}/ct`, { recursive: true });
    for (const file of r.files) {
      if (file[0].includes("/") || file[0] === "DICOMDIR") continue;
      writeFileSync(`${to}/ct/${file[0]}`, bytesOf(file));
    }
    writeFileSync(`${to}/seg.dcm`, made());
    writeFileSync(`${to}/seg.nii`, labelsNifti(labels, scan.source, null, organs));
  });

  it("is not made for slices that lie elsewhere than those of the scan, nor of no organ", async () => {
    const first = bytesOf(row("00_good").files[0]!);
    const [good, uneven, tilted] = await Promise.all(["00_good", "53_uneven", "52_tilted"].map((n) => read(sources(row(n)))));
    const slicesOf = (scan: DicomScan) => scan.images.map((i) => i.slice);
    for (const [one, other] of [[uneven, good], [good, uneven], [uneven, tilted]]) {
      expect(() => sourceSeries(slicesOf(one!), first, other!.source, "scan")).toThrow(/lie elsewhere than/);
    }
    expect(() => sourceSeries(slicesOf(good!).slice(1), first, good!.source, "scan")).toThrow(/12 slices .* got 11 of 20 x 24/);
    const series = sourceSeries(slicesOf(good!), first, good!.source, "scan");
    expect(dicomSeg(new Uint8Array(good!.voxels.length), good!.source, series, organs, by, new Date(0))).toBeNull();
  });

  it("has the colours of Python", () => {
    expect(cielab([165, 85, 50])).toEqual([29976, 41025, 42019]);
  });
});
