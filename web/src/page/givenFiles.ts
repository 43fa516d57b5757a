/** Files that a person chose or dropped, with the folders that they lie in. */

const MAX_LEVELS = 8;
const MAX_FILES = 100_000;

export interface Given {
  path: string;
  file: File;
}

export function listedFiles(files: FileList | null): Given[] {
  return [...(files ?? [])].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
}

/** What to call them: the file, or the folder. */
export function givenName(files: Given[]): string {
  const first = files[0]!.path;
  return files.length === 1 ? first.split("/").at(-1)! : first.includes("/") ? first.split("/")[0]! : "these files";
}

/** Dropped files, and all files of dropped folders. Must be called while the event lasts. */
export async function droppedFiles(data: DataTransfer): Promise<Given[]> {
  const entries = [...data.items].map((item) => item.webkitGetAsEntry?.() ?? null);
  if (!entries.some((entry) => entry?.isDirectory)) return listedFiles(data.files);
  const found: Given[] = [];
  for (const entry of entries) if (entry) await collect(entry, "", 0, found);
  return found;
}

async function collect(entry: FileSystemEntry, parent: string, level: number, found: Given[]): Promise<void> {
  const path = `${parent}${entry.name}`;
  if (entry.isFile) {
    const file = await new Promise<File>((resolve, reject) => (entry as FileSystemFileEntry).file(resolve, reject));
    found.push({ path, file });
    return;
  }
  if (level > MAX_LEVELS || found.length > MAX_FILES) return;
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  // A reader hands out its entries in parts, until an empty one.
  for (;;) {
    const part = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (part.length === 0) return;
    for (const child of part) await collect(child, `${path}/`, level + 1, found);
  }
}
