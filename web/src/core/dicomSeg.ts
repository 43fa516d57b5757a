/**
 * DICOM SEG out: a segmentation as an object beside its series, one coded segment an organ, a bit a voxel.
 *
 * The attributes are those of `io/dicom/seg.py`; frames without a voxel are left out, as there.
 */
import { asAcquired, sliceShape } from "./acquired.ts";
import { ANATOMICAL_STRUCTURE, cielab, organCode, organSide, organText, type Code } from "./dicomCodes.ts";
import type { SourceSeries } from "./dicomSource.ts";
import { AppError } from "./errors.ts";
import { decimal, dicomFile, item, type DicomItem } from "./dicomWrite.ts";
import { fromCanonical, columnLengths, type SourceGrid } from "./grid.ts";
import type { Organ } from "./model.ts";
import { sha256 } from "./sha256.ts";

const SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4";
/** Of this program's own files; a UID made of a name. *Source* of the form: DICOM PS3.5 annex B.2. */
const IMPLEMENTATION = uid(["autosam3d web"]);

/** What the reader calls even and straight, in slices and in columns and rows; as in `io/dicom/`. */
const MAX_UNEVEN_VOX = 0.06;
const MAX_LEAN_VOX = 0.5;

/** What made a segmentation, as it is named inside the object. */
export interface Algorithm {
  name: string;
  version: string;
  /** Of the model. */
  sha256: string;
}

interface Frame {
  segment: number;
  plane: number;
  /** Its place among the segment's own frames' positions, from 1. */
  position: number;
}

/** The bytes of the object; null where no organ has a voxel. `labels` are [z, y, x] on `grid`, the object's on the slices
 * as they were acquired. */
export function dicomSeg(labels: Uint8Array, grid: SourceGrid, series: SourceSeries, organs: Organ[], by: Algorithm,
  now: Date): Uint8Array | null {
  const planes = asAcquired(fromCanonical(labels, grid), grid);
  const [columns, rows, depth] = sliceShape(grid);
  const size = columns * rows;
  const found = new Set(planes);
  const present = organs.filter(({ value }) => found.has(value));
  if (present.length === 0) return null;
  const { frames, bits } = packedFrames(planes, size, depth, present);
  demandSame(bits, frames, planes, size, present);
  const told = [...series.slices.map((s) => s.uids.SOPInstanceUID), by.name, by.version, by.sha256, hex(sha256(planes)),
    ...present.map((o) => o.name)];
  const own = uid(["seg web", ...told]);
  const dataset = joinedItems(common(series, by, own, uid(["seg web series", ...told]), now), series.identity,
    pixelModule(columns, rows, frames.length, bits), references(series),
    groups(frames, series, grid, uid(["dimensions", ...told])),
    item([0x00620001, "CS", "BINARY"], [0x00620013, "CS", "NO"], [0x20500020, "CS", "IDENTITY"],
      [0x00620002, "SQ", present.map((organ, i) => segment(organ, i + 1, by))]));
  return dicomFile(item([0x00020001, "OB", Uint8Array.of(0, 1)], [0x00020002, "UI", SEGMENTATION_STORAGE],
    [0x00020003, "UI", own], [0x00020010, "UI", "1.2.840.10008.1.2.1"], [0x00020012, "UI", IMPLEMENTATION],
    [0x00020013, "SH", "AUTOSAM3D_WEB"]), dataset);
}

/** The frames that hold a voxel, segment by segment; bits follow each other without a gap. *Source*: PS3.5 8.1.1. */
function packedFrames(planes: Uint8Array, size: number, depth: number, present: Organ[]
): { frames: Frame[]; bits: Uint8Array } {
  const has = Array.from({ length: depth }, (_, z) => new Set(planes.subarray(z * size, (z + 1) * size)));
  // Positions that any segment uses, in order: what a frame's second index counts.
  const used = has.flatMap((values, z) => (present.some((o) => values.has(o.value)) ? [z] : []));
  const frames = present.flatMap((organ, i) => used.flatMap((plane, position): Frame[] =>
    (has[plane]!.has(organ.value) ? [{ segment: i + 1, plane, position: position + 1 }] : [])));
  const bytes = Math.ceil((frames.length * size) / 8);
  const bits = new Uint8Array(bytes + (bytes & 1));
  frames.forEach(({ segment: number, plane }, index) => {
    const { value } = present[number - 1]!;
    for (let i = 0, bit = index * size; i < size; i++, bit++) {
      if (planes[plane * size + i] === value) bits[bit >> 3]! |= 1 << (bit & 7);
    }
  });
  return { frames, bits };
}

/** The labels once more out of the bits: what differs from the segmentation is not handed out. */
function demandSame(bits: Uint8Array, frames: Frame[], planes: Uint8Array, size: number, present: Organ[]) {
  const found = new Uint8Array(planes.length);
  frames.forEach(({ segment: number, plane }, index) => {
    const { value } = present[number - 1]!;
    for (let i = 0, bit = index * size; i < size; i++, bit++) {
      // Added, so that two segments in one voxel show as another label.
      if (bits[bit >> 3]! & (1 << (bit & 7))) found[plane * size + i]! += value;
    }
  });
  if (found.every((label, i) => label === planes[i])) return;
  throw new AppError("READ_BACK", "DICOM SEG", "what was written differs from the segmentation",
    "download NIfTI, and report this as a bug");
}

function common({ slices, seriesNumber, positionReference }: SourceSeries, by: Algorithm, own: string, seriesUid: string,
  now: Date): DicomItem {
  const stamp = now.toISOString().replace(/[-:]/g, "");
  const [date, time] = [stamp.slice(0, 8), stamp.slice(9, 15)];
  return item([0x00080005, "CS", "ISO_IR 192"], [0x00080008, "CS", "DERIVED\\PRIMARY"], [0x00080012, "DA", date],
    [0x00080013, "TM", time], [0x00080016, "UI", SEGMENTATION_STORAGE], [0x00080018, "UI", own],
    [0x00080023, "DA", date], [0x00080033, "TM", time], [0x00080060, "CS", "SEG"], [0x00080070, "LO", "autosam3d"],
    [0x0008103e, "LO", `${by.name}, not reviewed`.slice(0, 64)], [0x00081090, "LO", by.name.slice(0, 64)],
    [0x00181000, "LO", by.sha256.slice(0, 16)], [0x00181020, "LO", by.version || "0"],
    [0x0020000d, "UI", slices[0]!.uids.StudyInstanceUID], [0x0020000e, "UI", seriesUid],
    [0x00200011, "IS", String(((100 * seriesNumber) % 1e8) + 1)], [0x00200013, "IS", "1"],
    [0x00200052, "UI", slices[0]!.uids.FrameOfReferenceUID], [0x00201040, "LO", positionReference],
    [0x00700080, "CS", "SEGMENTATION"], [0x00700081, "LO", "Automatic segmentation, not reviewed"],
    [0x00700084, "PN", ""]);
}

function pixelModule(columns: number, rows: number, frames: number, bits: Uint8Array): DicomItem {
  return item([0x00280002, "US", [1]], [0x00280004, "CS", "MONOCHROME2"], [0x00280008, "IS", String(frames)],
    [0x00280010, "US", [rows]], [0x00280011, "US", [columns]], [0x00280100, "US", [1]],
    [0x00280101, "US", [1]], [0x00280102, "US", [0]], [0x00280103, "US", [0]], [0x00282110, "CS", "00"],
    [0x7fe00010, "OB", bits]);
}

function references({ slices }: SourceSeries): DicomItem {
  const images = slices.map(({ uids }) => item([0x00081150, "UI", uids.SOPClassUID], [0x00081155, "UI", uids.SOPInstanceUID]));
  return item([0x00081115, "SQ", [item([0x0008114a, "SQ", images], [0x0020000e, "UI", slices[0]!.uids.SeriesInstanceUID])]],
    [0x00082112, "SQ", images]);
}

/** Where the frames lie: dimensions, what all frames share, what each has of its own. */
function groups(frames: Frame[], { slices }: SourceSeries, grid: SourceGrid, dimensions: string): DicomItem {
  const first = slices[0]!;
  const step = columnLengths(grid.affine)[2];
  const own = ownThicknesses(grid);
  const measures = (thickness: number): DicomItem => item([0x00180050, "DS", decimal(thickness)],
    ...(own ? [] : [[0x00180088, "DS", decimal(step)] as [number, string, string]]),
    [0x00280030, "DS", first.spacingMm.map(decimal).join("\\")]);
  const index = (pointer: number, group: number, text: string) => item([0x00209164, "UI", dimensions],
    [0x00209165, "AT", [pointer]], [0x00209167, "AT", [group]], [0x00209421, "LO", text]);
  const shared = item(
    [0x00209116, "SQ", [item([0x00200037, "DS", first.orientation.flat().map(decimal).join("\\")])]]);
  if (!own) shared.set(0x00289110, ["SQ", [measures(step)]]);
  return item([0x00209221, "SQ", [item([0x00209164, "UI", dimensions])]],
    [0x00209222, "SQ", [index(0x0062000b, 0x0062000a, "Referenced Segment Number"),
      index(0x00200032, 0x00209113, "Image Position Patient")]],
    [0x52009229, "SQ", [shared]],
    [0x52009230, "SQ", frames.map(({ segment: number, plane, position }) => {
      const slice = slices[plane]!;
      const group = item([0x00089124, "SQ", [item([0x00082112, "SQ", [item([0x00081150, "UI", slice.uids.SOPClassUID],
        [0x00081155, "UI", slice.uids.SOPInstanceUID], [0x0028135a, "CS", "YES"],
        [0x0040a170, "SQ", [codeItem(["121322", "DCM", "Source image for image processing operation"])]])]],
        [0x00089215, "SQ", [codeItem(["113076", "DCM", "Segmentation"])]])]],
      [0x00209111, "SQ", [item([0x00209157, "UL", [number, position]])]],
      [0x00209113, "SQ", [item([0x00200032, "DS", slice.position.map(decimal).join("\\")])]],
      [0x0062000a, "SQ", [item([0x0062000b, "US", [number]])]]);
      if (own) group.set(0x00289110, ["SQ", [measures(own[plane]!)]]);
      return group;
    })]);
}

/** Of slices that lie unevenly, how much of the normal each stands for, in mm; null where all lie one distance apart. */
function ownThicknesses(grid: SourceGrid): number[] | null {
  const heights = grid.acquired?.heights ?? [];
  const gaps = heights.slice(1).map((h, i) => h - heights[i]!);
  if (gaps.every((gap) => Math.abs(gap - 1) <= MAX_UNEVEN_VOX)) return null;
  const step = columnLengths(grid.affine)[2];
  return heights.map((_, k) => ((gaps[Math.max(k - 1, 0)]! + gaps[Math.min(k, gaps.length - 1)]!) / 2) * step);
}

/** A sentence where a common reader makes something else of the object; null where none is known to. */
export function readersThatFail(grid: SourceGrid): string | null {
  const shifts = grid.acquired?.shifts ?? [];
  const spread = [0, 1].map((i) => Math.max(...shifts.map((s) => s[i]!)) - Math.min(...shifts.map((s) => s[i]!)));
  const tilted = spread.some((v) => v > MAX_LEAN_VOX);
  const how = [...(tilted ? ["tilted"] : []), ...(ownThicknesses(grid) ? ["unevenly spaced"] : [])];
  if (how.length === 0) return null;
  const fault = tilted ? "refuses this object" : "lays this object on even slices, with gaps and other volumes";
  return `the slices are ${how.join(" and ")}: 3D Slicer's reader of DICOM SEG ${fault}; for 3D Slicer take NIfTI`;
}

function segment(organ: Organ, number: number, by: Algorithm): DicomItem {
  const type = codeItem(organCode(organ));
  const side = organSide(organ);
  if (side) type.set(0x00620011, ["SQ", [codeItem(side)]]);
  return item([0x00620003, "SQ", [codeItem(ANATOMICAL_STRUCTURE)]], [0x00620004, "US", [number]],
    [0x00620005, "LO", organText(organ.name)],
    [0x00620007, "SQ", [item([0x0066002f, "SQ", [codeItem(["123110", "DCM", "Artificial Intelligence"])]],
      [0x00660031, "LO", `${by.version} ${by.sha256.slice(0, 16)}`.trim().slice(0, 64)],
      [0x00660036, "LO", by.name.slice(0, 64)])]],
    [0x00620008, "CS", "AUTOMATIC"], [0x00620009, "LO", by.name.slice(0, 64)],
    [0x0062000d, "US", cielab(organ.rgb)], [0x0062000f, "SQ", [type]]);
}

function codeItem([value, scheme, meaning]: Code): DicomItem {
  return item([0x00080100, "SH", value], [0x00080102, "SH", scheme], [0x00080104, "LO", meaning]);
}

function joinedItems(...items: DicomItem[]): DicomItem {
  return new Map(items.flatMap((one) => [...one]));
}

/** A UID that is the same for the same content. */
function uid(told: string[]): string {
  const digest = sha256(new TextEncoder().encode(told.join("\n"))).subarray(0, 16);
  return `2.25.${BigInt(`0x${hex(digest)}`)}`;
}

function hex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
