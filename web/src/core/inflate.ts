/** A file's bytes, inflated where it is gzip, and never more than its NIfTI header claims. */
import { AppError } from "./errors.ts";
import { claimedBytes, parseHeader, type NiftiHeader } from "./nifti.ts";

const HEADER_BYTES = 540;
const MAX_PADDING_BYTES = 1 << 20;
const MAX_DEFLATE_RATIO = 1032;

/**
 * The file's bytes up to its last voxel.
 *
 * @param admit is told the header before anything large is allocated; it throws where the scan is too large.
 */
export async function inflatedNifti(file: Blob, where: string, admit: (header: NiftiHeader) => void
): Promise<Uint8Array> {
  if (file.size === 0) throw new AppError("EMPTY", where, "the file is empty", "copy or export it again");
  const magic = new Uint8Array(await file.slice(0, 2).arrayBuffer());
  const packed = magic[0] === 0x1f && magic[1] === 0x8b;
  const stream = packed ? file.stream().pipeThrough(new DecompressionStream("gzip")) : file.stream();
  const reader = stream.getReader() as ReadableStreamDefaultReader<Uint8Array>;
  const start = await readStart(reader, where);
  const header = parseHeader(start, where);
  const wanted = claimedBytes(header);
  if (wanted > file.size * (packed ? MAX_DEFLATE_RATIO : 1)) {
    throw new AppError("SIZE", where, "the header claims more voxels than the file can hold",
      "the file is cut or its header is wrong; copy it again");
  }
  admit(header);
  const bytes = allocated(wanted, where);
  let filled = 0;
  for (let chunk: Uint8Array | undefined = start; chunk; chunk = await nextChunk(reader, where)) {
    const kept = chunk.subarray(0, Math.max(0, wanted - filled));
    bytes.set(kept, Math.min(filled, wanted));
    filled += chunk.length;
    if (filled > wanted + MAX_PADDING_BYTES) {
      await reader.cancel();
      throw new AppError("SIZE", where, "the file goes on behind its last voxel", "copy or export it again");
    }
  }
  return bytes.subarray(0, Math.min(filled, wanted));
}

async function readStart(reader: ReadableStreamDefaultReader<Uint8Array>, where: string): Promise<Uint8Array> {
  const chunks: Uint8Array[] = [];
  let size = 0;
  while (size < HEADER_BYTES) {
    const chunk = await nextChunk(reader, where);
    if (!chunk) break;
    chunks.push(chunk);
    size += chunk.length;
  }
  const start = new Uint8Array(size);
  let at = 0;
  for (const chunk of chunks) {
    start.set(chunk, at);
    at += chunk.length;
  }
  return start;
}

/** The stream checks gzip's checksum and length at its end, so the whole of it is read. */
async function nextChunk(reader: ReadableStreamDefaultReader<Uint8Array>, where: string
): Promise<Uint8Array | undefined> {
  try {
    const { done, value } = await reader.read();
    return done ? undefined : value;
  } catch {
    throw new AppError("CRC", where, "the compressed data is cut or damaged", "copy or download it again");
  }
}

/** Bytes, or a refusal in words where the browser has none. */
function allocated(size: number, where: string): Uint8Array {
  try {
    return new Uint8Array(size);
  } catch {
    throw new AppError("MEMORY", where, "this browser has no memory for the scan",
      "close other tabs, or use a machine with more memory");
  }
}
