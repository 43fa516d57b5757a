/** A zip file's members, read one at a time from its directory; names are never taken as paths. */
import { AppError, sizeText } from "./errors.ts";
import type { Source } from "./dicomSeries.ts";

const [END, ENTRY, LOCAL] = [0x06054b50, 0x02014b50, 0x04034b50];
const MAX_END_BYTES = 65_557;
const MAX_DIRECTORY_BYTES = 64 << 20;
const MAX_MEMBERS = 100_000;
const MAX_TOTAL_BYTES = 16 * 2 ** 30;
const UNIX_LINK = 0o120000;
const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

export async function isZip(file: Blob): Promise<boolean> {
  const start = await bytesOf(file, 0, 4);
  return start.length === 4 && (new DataView(start.buffer).getUint32(0, true) === LOCAL || u32(start, 0) === END);
}

/** The files inside; folders are left out, links are marked. ARCHIVE_DAMAGED, ARCHIVE_ENCRYPTED or
 * ARCHIVE_SIZE. */
export async function zipMembers(file: Blob, where: string): Promise<Source[]> {
  const damaged = (fault: string) => new AppError("ARCHIVE_DAMAGED", where, fault, "copy or pack it again");
  const tail = await bytesOf(file, Math.max(0, file.size - MAX_END_BYTES), file.size);
  let end = tail.length - 22;
  while (end >= 0 && u32(tail, end) !== END) end--;
  if (end < 0) throw damaged("the zip file is cut: it has no directory");
  const [count, size, start] = [u16(tail, end + 10), u32(tail, end + 12), u32(tail, end + 16)];
  if (count === 0xffff || start === 0xffffffff) throw damaged("zip files of the large form (ZIP64) are not read");
  if (count > MAX_MEMBERS || size > MAX_DIRECTORY_BYTES) {
    throw new AppError("ARCHIVE_SIZE", where, `expected one series, found ${count} files`, "pack the series alone");
  }
  if (start + size > file.size) throw damaged("the zip file is cut or damaged");
  const directory = await bytesOf(file, start, start + size);
  const members: Source[] = [];
  let total = 0;
  for (let at = 0, i = 0; i < count; i++) {
    if (at + 46 > directory.length || u32(directory, at) !== ENTRY) throw damaged("its directory is damaged");
    const [nameLength, extra, comment] = [u16(directory, at + 28), u16(directory, at + 30), u16(directory, at + 32)];
    const name = new TextDecoder().decode(directory.subarray(at + 46, at + 46 + nameLength));
    const entry = { method: u16(directory, at + 10), crc: u32(directory, at + 16), packed: u32(directory, at + 20),
      size: u32(directory, at + 24), at: u32(directory, at + 42) };
    if (u16(directory, at + 8) & 1) {
      throw new AppError("ARCHIVE_ENCRYPTED", where, "the zip file is encrypted", "unpack it, and give the folder");
    }
    total += entry.size;
    if (total > MAX_TOTAL_BYTES) {
      throw new AppError("ARCHIVE_SIZE", where, `it claims more than ${sizeText(MAX_TOTAL_BYTES)}`, "pack the series alone");
    }
    const mode = u32(directory, at + 38) >>> 16;
    if (!name.endsWith("/")) {
      members.push({ name, size: entry.size, isLink: (mode & 0o170000) === UNIX_LINK,
        read: (limit) => memberBytes(file, entry, limit, where) });
    }
    at += 46 + nameLength + extra + comment;
  }
  return members;
}

interface Entry { method: number; crc: number; packed: number; size: number; at: number }

/** A member's bytes, never more than it claims nor than `limit`. */
async function memberBytes(file: Blob, entry: Entry, limit: number, where: string): Promise<Uint8Array> {
  const damaged = () => new AppError("ARCHIVE_DAMAGED", where, "a file in it is damaged", "copy or pack it again");
  const head = await bytesOf(file, entry.at, entry.at + 30);
  if (head.length < 30 || u32(head, 0) !== LOCAL) throw damaged();
  const start = entry.at + 30 + u16(head, 26) + u16(head, 28);
  const packed = file.slice(start, start + entry.packed);
  if (packed.size !== entry.packed || ![0, 8].includes(entry.method)) throw damaged();
  const wanted = Math.min(entry.size, limit);
  const out = new Uint8Array(wanted);
  const stream = entry.method === 0 ? packed.stream()
    : packed.stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const reader = stream.getReader() as ReadableStreamDefaultReader<Uint8Array>;
  let filled = 0;
  try {
    for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
      const kept = chunk.value.subarray(0, wanted - filled);
      out.set(kept, filled);
      filled += kept.length;
      if (kept.length < chunk.value.length || (wanted < entry.size && filled === wanted)) break;
    }
    if (wanted < entry.size) return out.subarray(0, filled);
    if (filled === wanted && (await reader.read()).done && crc32(out) === entry.crc) return out;
  } catch {
    // Said below.
  } finally {
    void reader.cancel().catch(() => undefined);
  }
  throw damaged();
}

function crc32(bytes: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC[(crc ^ byte) & 255]! ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

async function bytesOf(file: Blob, start: number, end: number): Promise<Uint8Array> {
  return new Uint8Array(await file.slice(start, end).arrayBuffer());
}

function u16(bytes: Uint8Array, at: number): number {
  return bytes[at]! | (bytes[at + 1]! << 8);
}

function u32(bytes: Uint8Array, at: number): number {
  return (u16(bytes, at) | (u16(bytes, at + 2) << 16)) >>> 0;
}
