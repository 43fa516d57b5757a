/** What page and worker say to each other. */
import type { SeriesChoice } from "./core/dicomChoice.ts";
import type { Triple } from "./core/grid.ts";

/** The one order that the worker takes; to stop it, it is ended. */
export interface Start {
  files: { path: string; file: File }[];
  /** What messages call them. */
  name: string;
  /** Address of the folder that the page was loaded from. */
  base: string;
  /** Most bytes that the tab may hold. */
  budget: number;
  /** Of several DICOM series the one that the person chose. */
  series?: string;
  /** Whether the person wants the graphics card, if it proves right. */
  graphics: boolean;
}

export type Report =
  | { type: "stage"; text: string }
  | { type: "threads"; count: number; isolated: boolean }
  /** Whether the graphics card computes, and else why not, as a clause; only where it was asked for. */
  | { type: "graphics"; fault: string | null }
  /** Several series: the person has to say which. */
  | { type: "choose"; choices: SeriesChoice[] }
  /** The CT for the viewer, as soon as it is read. */
  | { type: "scan"; nifti: ArrayBuffer; shape: Triple; warnings: string[] }
  /** What a person should know of the result. */
  | { type: "remark"; text: string }
  | { type: "progress"; done: number; total: number; secondsLeft: number | null }
  /** Files of a series that were read; `total` is not what windows are. */
  | { type: "reading"; done: number; total: number }
  | {
      type: "done";
      /** Labels for the viewer, RAS. */
      shown: ArrayBuffer;
      /** The .nii on the scan's own grid. */
      file: ArrayBuffer;
      /** The DICOM SEG; null where the scan was none, or cannot be referred to. */
      seg: ArrayBuffer | null;
      /** Voxels of each label, background first. */
      counts: number[];
      /** Mean probability of each label's voxels. */
      confidence: number[];
      voxelMl: number;
      seconds: number;
    }
  | { type: "error"; code: string; message: string };
