/** OpenJPEG, loaded when the first slice needs it. */
import openJpeg from "@cornerstonejs/codec-openjpeg/decodewasmjs";
import { decodeJpeg2000 } from "./core/dicomJpeg2000.ts";
import type { DecodeSamples } from "./core/dicomPixels.ts";
import { AppError } from "./core/errors.ts";

export async function loadJpeg2000(base: string): Promise<DecodeSamples> {
  const response = await fetch(`${base}codecs/openjpeg.wasm`).catch(() => null);
  if (!response?.ok) throw new AppError("NO_CODEC", "openjpeg.wasm", "it cannot be loaded", "check the web folder");
  return jpeg2000Of(new Uint8Array(await response.arrayBuffer()));
}

/** Of the bytes of its WebAssembly. */
export async function jpeg2000Of(wasmBinary: Uint8Array): Promise<DecodeSamples> {
  const quiet = () => undefined;
  const module = await openJpeg({ wasmBinary, print: quiet, printErr: quiet });
  return (bytes, rows, columns) => decodeJpeg2000(module, bytes, rows, columns);
}
