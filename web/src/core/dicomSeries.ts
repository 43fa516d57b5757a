/**
 * A DICOM series in: the slices of one CT scan, put in order and into one volume, or refused with the reason.
 *
 * The counterpart of `io/dicom/series.py`, with its limits, codes and words. A series of a tilted gantry, or with uneven slices,
 * is resampled to a straight and even grid, which remembers its slices.
 */
import { movedBy, onGrid, straightGrid } from "./acquired.ts";
import { JPEG_2000_LOSSLESS, parseSlice, type CtSlice } from "./dicomFile.ts";
import { corrupt, isDicom } from "./dicomParse.ts";
import { decodeHu, type DecodeSamples } from "./dicomPixels.ts";
import { normalOf, stackingOf } from "./dicomStack.ts";
import { AppError, sizeText } from "./errors.ts";
import { canonicalAffine, canonicalShape, checkAffine, checkExtent, columnLengths, sourceGrid, toCanonical,
  type Affine, type Triple } from "./grid.ts";
import { checkHounsfield } from "./hounsfield.ts";
import type { Volume } from "./nifti.ts";

export const MAX_FILE_BYTES = 512 << 20;
const MIN_SLICES = 8;
const SAME_DIRECTION = 1e-3;
const MAX_OTHER_ORIENTATION_SHARE = 0.1;
const SAME_PLACE_MM = 0.01;
/** RescaleTypes that are no Hounsfield units. *Source*: DICOM PS3.3 C.11.1.1.2. */
const OTHER_UNITS = ["ED", "EDW", "MGML", "OD", "PCT", "Z_EFF"];
/** What is left out, as one and as several; other kinds are modalities. */
const KINDS: Record<string, [string, string]> = {
  foreign: ["file that is not DICOM", "files that are not DICOM"], link: ["link", "links"],
  hidden: ["DICOMDIR or hidden file", "DICOMDIR or hidden files"], localizer: ["localizer", "localizers"],
  "secondary capture": ["secondary capture", "secondary captures"],
  other: ["DICOM file of another kind", "DICOM files of other kinds"],
};

/** A file of a folder or a zip; `name` may have folders in it and only sorts. */
export interface Source {
  name: string;
  size: number;
  isLink: boolean;
  /** Its bytes, `limit` of them at most. */
  read: (limit: number) => Promise<Uint8Array>;
}

/** One of several series, for a person to choose from. */
export interface SeriesChoice {
  key: string;
  title: string;
  slices: number;
  rows: number;
  columns: number;
}

/** Several series: the person has to say which. */
export class ChoiceError extends AppError {
  constructor(where: string, fault: string, readonly choices: SeriesChoice[]) {
    super("SERIES_CHOICE", where, fault, "choose one");
  }
}

export interface DicomScan extends Volume {
  /** One a place along the normal, with the file that it came from. */
  images: { slice: CtSlice; source: Source }[];
}

export interface ReadOrder {
  where: string;
  /** Of `SeriesChoice`. */
  series?: string;
  /** Is told the grid's shape and affine, and the bytes of what else there is while it is filled, before anything large
   * is allocated; it throws where the scan is too large. */
  admit: (shape: Triple, affine: Affine, bytes: number) => void;
  progress: (done: number, total: number) => void;
  /** Loads the decoder of JPEG 2000; called once, where a slice needs it. */
  jpeg2000: () => Promise<DecodeSamples>;
}

/** The CT series among `sources` as float32 HU [z, y, x] nearest RAS+. */
export async function readSeries(sources: Source[], order: ReadOrder): Promise<DicomScan> {
  const { where } = order;
  const warnings: string[] = [];
  const files = sources.filter((s) => !s.isLink && !isHidden(s.name)).sort((a, b) => (a.name < b.name ? -1 : 1));
  const slices = await scan(files, sources, order, warnings);
  const stack = withoutStrays(chosen(slices, order, warnings), where, warnings);
  checkUniform(stack, where, warnings);
  const places = placesOf(stack);
  demandOwnUids(places, where);
  const named = `${where}: series ${stack[0]!.series}`;
  if (places.length < MIN_SLICES) {
    throw new AppError("FEW_SLICES", named, `expected at least ${MIN_SLICES} slices, got ${places.length}`,
      "give the whole series");
  }
  const first = places[0]![0]!;
  const stacking = stackingOf(places.map((place) => place[0]!), named, warnings);
  const grid = straightGrid(stacking, first.columns, first.rows);
  const asStored = affineOf(first, stacking.stepMm);
  // Slices that are resampled exist twice for a while, as they were and on the grid.
  const slicesBytes = grid.acquired ? 4 * places.length * first.rows * first.columns : 0;
  order.admit(grid.shape, asStored, Math.max(...files.map((f) => f.size)) + slicesBytes);
  const planes = onGrid(await decoded(places, files, order, warnings), stacking, grid);
  const affine = movedBy(checkAffine(asStored, named, "affine", warnings), grid.start);
  checkExtent(affine, grid.shape, named);
  const source = { ...sourceGrid(grid.shape, affine), acquired: grid.acquired };
  const shape = canonicalShape(source);
  const voxels = new Float32Array(planes.length);
  toCanonical(planes, source, voxels, (v) => v);
  checkHounsfield(voxels, shape, named, warnings);
  const canonical = canonicalAffine(source);
  const [x, y, z] = columnLengths(canonical);
  return { voxels, shape, affine: canonical, spacingMm: [z, y, x], source, raw: null, warnings,
    images: places.map((place) => ({ slice: place[0]!, source: files[place[0]!.number - 1]! })) };
}

/** The bytes of a DICOM file, or null where it is another kind. */
async function dicomBytes(source: Source, where: string): Promise<Uint8Array | null> {
  const start = await source.read(132);
  if (!isDicom(start)) {
    if (start.length < 132 && /\.(dcm|ima)$/i.test(source.name)) throw corrupt(where, `it has ${start.length} bytes only`);
    return null;
  }
  if (source.size > MAX_FILE_BYTES) {
    throw new AppError("LENGTH", where, `expected at most ${sizeText(MAX_FILE_BYTES)} a slice`,
      "copy or export the series again");
  }
  return source.read(MAX_FILE_BYTES);
}

function isHidden(name: string): boolean {
  const last = name.split("/").at(-1)!;
  return last.toUpperCase() === "DICOMDIR" || last.startsWith(".");
}

async function scan(files: Source[], all: Source[], { where, progress }: ReadOrder, warnings: string[]
): Promise<CtSlice[]> {
  const others = new Map<string, number>();
  const count = (kind: string, n = 1) => n > 0 && others.set(kind, (others.get(kind) ?? 0) + n);
  count("link", all.filter((s) => s.isLink).length);
  count("hidden", all.filter((s) => !s.isLink && isHidden(s.name)).length);
  const slices: CtSlice[] = [];
  let numDicom = 0;
  for (const [index, source] of files.entries()) {
    const at = `${where}: file ${index + 1} of ${files.length}`;
    const bytes = await dicomBytes(source, at);
    if (bytes) numDicom++;
    const found = bytes ? parseSlice(bytes, index + 1, at) : "foreign";
    if (typeof found === "string") count(found);
    else slices.push(found);
    progress(index + 1, 2 * files.length);
  }
  const texts = [...others].sort(([a], [b]) => (a < b ? -1 : 1)).map(([kind, n]) => {
    const [one, several] = KINDS[kind] ?? [`${kind} object`, `${kind} objects`];
    return `${n} ${n === 1 ? one : several}`;
  });
  const found = texts.join(", ") || "no file at all";
  if (numDicom === 0) {
    throw new AppError("NO_DICOM", where, `expected DICOM files, found ${found}`,
      "give the folder that holds the slices, or a .nii.gz file");
  }
  if (slices.length === 0) {
    throw new AppError("MODALITY", where, `expected CT images, found ${found}`, "give a folder with a CT series");
  }
  warnings.push(...texts.map((text) => `left out: ${text}`));
  return slices;
}

function chosen(slices: CtSlice[], { where, series }: ReadOrder, warnings: string[]): CtSlice[] {
  const groups = new Map<string, CtSlice[]>();
  for (const slice of slices) groups.set(slice.series, [...(groups.get(slice.series) ?? []), slice]);
  let group = groups.get(series ?? "");
  if (series !== undefined && !group) throw choice(groups, where, "no such series");
  if (!group && groups.size === 1) group = slices;
  if (!group) {
    if (new Set(slices.map((s) => s.patient)).size > 1) {
      throw new AppError("PATIENTS", where, "expected one patient, found several", "use one folder a patient");
    }
    const stacks = [...groups].filter(([, members]) => members.length >= MIN_SLICES);
    if (stacks.length !== 1) throw choice(groups, where, "expected one CT series");
    group = stacks[0]![1];
    warnings.push(`series ${stacks[0]![0]} is taken; ${groups.size - 1} shorter ones are left out`);
  }
  if (new Set(group.map((s) => s.patient)).size > 1) {
    throw new AppError("PATIENTS", where, "the slices of one series name different patients", "sort the folder");
  }
  return group;
}

function choice(groups: Map<string, CtSlice[]>, where: string, fault: string): ChoiceError {
  const choices = [...groups].sort(([a], [b]) => (a < b ? -1 : 1)).map(([key, members]) => ({ key,
    title: members[0]!.title, slices: members.length, rows: members[0]!.rows, columns: members[0]!.columns }));
  const listed = choices.map((c) => `${c.key}: ${c.slices} slices of ${c.rows} x ${c.columns}`).join("; ");
  return new ChoiceError(where, `${fault}, found ${listed}`, choices);
}

/** Leaves out the few slices that lie across the stack: scouts that are not marked as such. */
function withoutStrays(slices: CtSlice[], where: string, warnings: string[]): CtSlice[] {
  const directions = slices.map((s) => s.orientation.flat().map((v) => Math.round(v * 100) + 0).join());
  const counts = new Map<string, number>();
  for (const d of directions) counts.set(d, (counts.get(d) ?? 0) + 1);
  const most = Math.max(...counts.values());
  const usual = slices[directions.indexOf([...counts].find(([, n]) => n === most)![0])]!.orientation.flat();
  const stack = slices.filter((s) => s.orientation.flat().every((v, i) => Math.abs(v - usual[i]!) <= SAME_DIRECTION));
  const across = slices.length - stack.length;
  if (across > Math.max(1, MAX_OTHER_ORIENTATION_SHARE * slices.length)) {
    throw new AppError("MIXED_ORIENTATION", where, `${across} of ${slices.length} slices lie otherwise than the rest`,
      "split the series by orientation");
  }
  if (across) warnings.push(`left out: ${across} slices that lie across the stack`);
  return stack;
}

function checkUniform(slices: CtSlice[], where: string, warnings: string[]) {
  const sizes = new Set(slices.map(({ rows, columns, spacingMm: [a, b] }) =>
    `${rows} x ${columns} pixels of ${Number(a.toFixed(4))} x ${Number(b.toFixed(4))} mm`));
  if (sizes.size > 1) {
    throw new AppError("MIXED_SIZE", where, `expected slices of one size, got ${[...sizes].sort().join("; ")}`,
      "split the series by size");
  }
  if (new Set(slices.map((s) => s.frameOfReference)).size > 1) {
    throw new AppError("MIXED_FRAME", where, "the slices name different frames of reference, so their positions "
      + "cannot be compared", "split the series");
  }
  if (new Set(slices.map((s) => `${s.slope} ${s.intercept}`)).size > 1) {
    warnings.push("rescale slope or intercept vary from slice to slice; each is applied to its own slice");
  }
  checkUnit(new Set(slices.map((s) => s.rescaleType)), where, warnings);
  if (slices.some((s) => s.photometric === "MONOCHROME1")) {
    warnings.push("MONOCHROME1 turns the display around, not the numbers; the numbers are taken as they are");
  }
}

/** Maps of iodine, of electron density and the like are CT images whose numbers are no HU. */
function checkUnit(kinds: Set<string>, where: string, warnings: string[]) {
  const other = OTHER_UNITS.filter((unit) => kinds.has(unit));
  if (other.length) {
    throw new AppError("NOT_HU", where, `expected Hounsfield units, got RescaleType ${other.join(", ")}: a map made from `
      + "several energies", "give the series of the CT itself");
  }
  if ([...kinds].some((kind) => !["", "HU"].includes(kind))) warnings.push("RescaleType is not HU");
}

/** A SOPInstanceUID names one image, so what has it in another place is not what it says. */
function demandOwnUids(places: CtSlice[][], where: string) {
  const first = new Map<string, [number, CtSlice]>();
  for (const [index, place] of places.entries()) {
    for (const slice of place) {
      const uid = slice.uids.SOPInstanceUID;
      const [at, named] = first.get(uid) ?? [index, slice];
      if (uid && at !== index) {
        throw new AppError("DUPLICATE_SLICE", where, `files ${named.number} and ${slice.number} have one SOPInstanceUID `
          + "and lie in different places", "export the series again");
      }
      first.set(uid, [at, named]);
    }
  }
}

/** Slices in the order of their height, those in one place together. */
function placesOf(slices: CtSlice[]): CtSlice[][] {
  const normal = normalOf(slices[0]!);
  const height = (s: CtSlice) => s.position[0] * normal[0] + s.position[1] * normal[1] + s.position[2] * normal[2];
  const places: CtSlice[][] = [];
  for (const slice of [...slices].sort((a, b) => height(a) - height(b) || a.number - b.number)) {
    const last = places.at(-1);
    if (last && Math.abs(height(slice) - height(last[0]!)) < SAME_PLACE_MM) last.push(slice);
    else places.push([slice]);
  }
  return places;
}

/** float32 [slice, row, column]; a slice that is there twice is taken once, where the two are equal. */
async function decoded(places: CtSlice[][], files: Source[], { where, progress, jpeg2000 }: ReadOrder,
  warnings: string[]): Promise<Float32Array> {
  const codec = places.flat().some((slice) => slice.syntax === JPEG_2000_LOSSLESS) ? await jpeg2000() : null;
  const size = places[0]![0]!.rows * places[0]![0]!.columns;
  const voxels = new Float32Array(places.length * size);
  let dropped = 0;
  for (const [index, place] of places.entries()) {
    for (const slice of place) {
      const at = `${where}: file ${slice.number} of ${files.length}`;
      const bytes = await dicomBytes(files[slice.number - 1]!, at);
      if (!bytes) throw corrupt(at, "it is no DICOM file any more");
      const found = decodeHu(bytes, slice, at, codec);
      if (found.dropped) dropped++;
      if (slice === place[0]) voxels.set(found.hu, index * size);
      else if (found.hu.some((v, i) => v !== voxels[index * size + i])) {
        throw new AppError("DUPLICATE_SLICE", where, `files ${place[0]!.number} and ${slice.number} lie in one place `
          + "and differ: two phases or reconstructions", "split the series");
      }
    }
    progress(places.length + index + 1, 2 * places.length);
  }
  if (dropped) {
    warnings.push(`${dropped} slices have bits set above BitsStored (an overlay); these bits are dropped`);
  }
  const twice = places.reduce((sum, place) => sum + place.length - 1, 0);
  if (twice) warnings.push(`${twice} slices were there twice, with equal pixels; each is taken once`);
  return voxels;
}

/** (column, row, slice) to RAS+ mm. *Source*: DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1. */
function affineOf(first: CtSlice, stepMm: number): Affine {
  const [row, column] = first.orientation;
  const normal = normalOf(first);
  return [...[0, 1, 2].flatMap((i) => {
    const sign = i < 2 ? -1 : 1;
    return [row[i]! * first.spacingMm[1], column[i]! * first.spacingMm[0], normal[i]! * stepMm, first.position[i]!]
      .map((v) => sign * v);
  }), 0, 0, 0, 1];
}
