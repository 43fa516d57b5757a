/** What is used of a package that brings no types. */
declare module "@cornerstonejs/codec-openjpeg/decodewasmjs" {
  import type { OpenJpeg } from "./core/dicomJpeg2000.ts";
  export default function open(options: { wasmBinary: Uint8Array; print: (text: string) => void;
    printErr: (text: string) => void }): Promise<OpenJpeg>;
}
