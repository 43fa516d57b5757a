/** What a person gave: a NIfTI file, a zip, or DICOM slices; told by content, never by name. */
import { readSeries, type DicomScan, type ReadOrder, type Source } from "./dicomSeries.ts";
import { AppError } from "./errors.ts";
import { isDicom } from "./dicomParse.ts";
import { inflatedNifti } from "./inflate.ts";
import { demandFits } from "./memory.ts";
import type { ModelDescription } from "./model.ts";
import { claimedBytes, readNifti, type Volume } from "./nifti.ts";
import { isZip, zipMembers } from "./zip.ts";

const MAX_FILES = 100_000;

export interface GivenFile {
  /** With the folders that it lies in. */
  path: string;
  file: Blob;
}

/** The CT in these files. `where` is what messages call them. */
export async function readGiven(given: GivenFile[], where: string, model: ModelDescription, budget: number,
  order: Pick<ReadOrder, "series" | "progress" | "jpeg2000">): Promise<Volume | DicomScan> {
  if (given.length > MAX_FILES) {
    throw new AppError("TOO_MANY_FILES", where, `expected one series, found more than ${MAX_FILES} files`,
      "give the folder of the series");
  }
  const admit: ReadOrder["admit"] = (shape, affine, fileBytes) =>
    demandFits({ shape, affine, fileBytes }, model, budget, where);
  const only = given.length === 1 ? given[0]! : null;
  if (only && await isZip(only.file)) {
    return readSeries(await zipMembers(only.file, where), { ...order, where, admit });
  }
  if (only && !isDicom(new Uint8Array(await only.file.slice(0, 132).arrayBuffer()))) {
    const bytes = await inflatedNifti(only.file, where, (h) => admit(h.shape, h.affine, claimedBytes(h)));
    return readNifti(bytes, where);
  }
  return readSeries(given.map(fileSource), { ...order, where, admit });
}

function fileSource({ path, file }: GivenFile): Source {
  return { name: path, size: file.size, isLink: false, read: async (limit) => {
    try {
      return new Uint8Array(await file.slice(0, limit).arrayBuffer());
    } catch {
      throw new AppError("UNREADABLE", "a file", "the browser cannot read it", "check that it is still there");
    }
  } };
}
