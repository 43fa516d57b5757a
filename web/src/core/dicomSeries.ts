/**
 * A DICOM series in: the slices of one CT scan, put in order and into one volume, or refused with the reason.
 *
 * The counterpart of `io/dicom/series.py`, with its limits, codes and words. A series of a tilted gantry, or with uneven slices,
 * is resampled to a straight and even grid, which remembers its slices.
 */
import { movedBy, onGrid, straightGrid } from "./acquired.ts";
import { demandOneAcquisition } from "./dicomAcquisitions.ts";
import { chosenSlices, countText, MIN_SLICES } from "./dicomChoice.ts";
import { isSlice, JPEG_2000_LOSSLESS, multiframeError, parseSlice, type CtSlice, type UnfitImage } from "./dicomFile.ts";
import { corrupt, DEFLATED, inflatedStart, isDicom, readMeta } from "./dicomParse.ts";
import { decodeHu, type DecodeSamples } from "./dicomPixels.ts";
import { along, normalOf, stackingOf, type OrientedStacking } from "./dicomStack.ts";
import { AppError } from "./errors.ts";
import { canonicalAffine, canonicalShape, checkAffine, checkExtent, columnLengths, sourceGrid, toCanonical,
  type Affine, type Triple } from "./grid.ts";
import { checkHounsfield } from "./hounsfield.ts";
import type { Volume } from "./nifti.ts";

export const MAX_FILE_BYTES = 512 << 20;
/** Of a file that is larger than any slice no more than this is read. */
const MAX_HEADER_BYTES = 16 << 20;
const SAME_PLACE_MM = 0.01;
/** A file of a folder or a zip; `name` may have folders in it and only sorts. */
export interface Source {
  name: string;
  size: number;
  isLink: boolean;
  /** Its bytes, `limit` of them at most. */
  read: (limit: number) => Promise<Uint8Array>;
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
  const { slices, unfit } = await scan(files, sources, order, warnings);
  const stack = chosenSlices(slices, unfit, order.series, where, warnings);
  const named = `${where}: series ${stack[0]!.series}`;
  const places = placesOf(stack);
  demandPlaces(places, stack.length, named);
  const heights = places.flat().map((s) => along(s.position, normalOf(stack[0]!.orientation)));
  demandOneAcquisition(places.flat().map((s) => s.acquired), places.flatMap((place, i) => place.map(() => i)), heights,
    named);
  demandOwnUids(places, where);
  if (places.length < MIN_SLICES) {
    throw new AppError("FEW_SLICES", named, `expected at least ${MIN_SLICES} slices, got ${places.length}`,
      "give the whole series");
  }
  const first = places[0]![0]!;
  const stacking = stackingOf(places.map((place) => place[0]!), named, warnings);
  const grid = straightGrid(stacking, first.columns, first.rows);
  const asStored = affineOf(first, stacking);
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

function demandPlaces(places: CtSlice[][], numSlices: number, where: string) {
  if (places.length >= MIN_SLICES || numSlices < MIN_SLICES) return;
  const several = places.length === 1 ? "one place" : `${places.length} places`;
  throw new AppError("SAME_PLACE", where, `expected slices one above the other, got ${numSlices} that lie in ${several}: `
    + "no volume can be made of them", "export the series again, with the ImagePositionPatient of each slice");
}

/** The bytes of a DICOM file, the beginning of one that is larger than any slice, or null where it is another kind. */
async function dicomBytes(source: Source, where: string): Promise<Uint8Array | null> {
  const start = await source.read(132);
  if (!isDicom(start)) {
    if (start.length < 132 && /\.(dcm|ima)$/i.test(source.name)) throw corrupt(where, `it has ${start.length} bytes only`);
    return null;
  }
  return source.read(source.size > MAX_FILE_BYTES ? MAX_HEADER_BYTES : MAX_FILE_BYTES);
}

function isHidden(name: string): boolean {
  const last = name.split("/").at(-1)!;
  return last.toUpperCase() === "DICOMDIR" || last.startsWith(".");
}

async function lookAt(source: Source, number: number, where: string): Promise<CtSlice | UnfitImage | string> {
  let bytes: Uint8Array | null;
  try {
    bytes = await dicomBytes(source, where);
  } catch (error) {
    if (!(error instanceof AppError && error.code === "SLICE_CORRUPT")) throw error;
    return { error, series: null, isPage: false, shape: null };
  }
  if (!bytes) return "foreign";
  return parseSlice(bytes, source.size, number, where, await inflatedOf(bytes, where));
}

async function inflatedOf(bytes: Uint8Array, where: string): Promise<Uint8Array | undefined> {
  try {
    const meta = readMeta(bytes, where);
    return meta.syntax === DEFLATED ? await inflatedStart(bytes.subarray(meta.begin)) : undefined;
  } catch {
    return undefined; // `parseSlice` says why
  }
}

async function scan(files: Source[], all: Source[], { where, progress }: ReadOrder, warnings: string[]
): Promise<{ slices: CtSlice[]; unfit: UnfitImage[] }> {
  const others = new Map<string, number>();
  const count = (kind: string, n = 1) => n > 0 && others.set(kind, (others.get(kind) ?? 0) + n);
  count("link", all.filter((s) => s.isLink).length);
  count("hidden", all.filter((s) => !s.isLink && isHidden(s.name)).length);
  const slices: CtSlice[] = [];
  const unfit: UnfitImage[] = [];
  for (const [index, source] of files.entries()) {
    const at = `${where}: file ${index + 1} of ${files.length}`;
    const found = await lookAt(source, index + 1, at);
    if (typeof found === "string") count(found);
    else if (isSlice(found)) slices.push(found);
    else unfit.push(found);
    progress(index + 1, 2 * files.length);
  }
  const texts = [...others].sort(([a], [b]) => (a < b ? -1 : 1)).map(([kind, n]) => countText(n, kind));
  demandSlices(slices, unfit, others, files.length, texts.join(", ") || "no file at all", where);
  warnings.push(...texts.map((text) => `left out: ${text}`));
  return { slices, unfit };
}

function demandSlices(slices: CtSlice[], unfit: UnfitImage[], others: Map<string, number>, numFiles: number,
  found: string, where: string) {
  if (slices.length) return;
  if (unfit.length) throw (unfit.find((image) => !image.isPage) ?? unfit[0]!).error;
  if ((others.get("foreign") ?? 0) === numFiles) {
    throw new AppError("NO_DICOM", where, `expected DICOM files, found ${found}`, others.has("link")
      ? "links are not followed: give the files themselves" : "give the folder that holds the slices, or a .nii.gz file");
  }
  if (others.has("multi-frame CT")) throw multiframeError(where);
  throw new AppError("MODALITY", where, `expected CT images, found ${found}`, "give a folder with a CT series");
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
  const normal = normalOf(slices[0]!.orientation);
  const height = (s: CtSlice) => along(s.position, normal);
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
  let [dropped, padded] = [0, 0];
  for (const [index, place] of places.entries()) {
    for (const slice of place) {
      const at = `${where}: file ${slice.number} of ${files.length}`;
      const bytes = await dicomBytes(files[slice.number - 1]!, at);
      if (!bytes) throw corrupt(at, "it is no DICOM file any more");
      const found = decodeHu(bytes, slice, at, codec);
      if (found.dropped) dropped++;
      if (slice === place[0]) {
        voxels.set(found.hu, index * size);
        padded += found.padded;
      }
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
  if (padded) warnings.push(`${padded} voxels of padding (PixelPaddingValue) are taken as air, -1024 HU`);
  return voxels;
}

/** (column, row, slice) to RAS+ mm. *Source*: DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1. */
function affineOf(first: CtSlice, { orientation, stepMm }: OrientedStacking): Affine {
  const [row, column] = orientation;
  const normal = normalOf(orientation);
  return [...[0, 1, 2].flatMap((i) => {
    const sign = i < 2 ? -1 : 1;
    return [row[i]! * first.spacingMm[1], column[i]! * first.spacingMm[0], normal[i]! * stepMm, first.position[i]!]
      .map((v) => sign * v);
  }), 0, 0, 0, 1];
}
