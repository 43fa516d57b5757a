/** What page and worker say to each other. */
import type { Triple } from "./core/grid.ts";

/** The one order that the worker takes; to stop it, it is ended. */
export interface Start {
  file: File;
  /** Address of the folder that the page was loaded from. */
  base: string;
  /** Most bytes that the tab may hold. */
  budget: number;
}

export type Report =
  | { type: "stage"; text: string }
  | { type: "threads"; count: number; isolated: boolean }
  /** The CT for the viewer, as soon as it is read. */
  | { type: "scan"; nifti: ArrayBuffer; shape: Triple; warnings: string[] }
  /** What a person should know of the result. */
  | { type: "remark"; text: string }
  | { type: "progress"; done: number; total: number; secondsLeft: number | null }
  | {
      type: "done";
      /** Labels for the viewer, RAS. */
      shown: ArrayBuffer;
      /** The .nii on the scan's own grid. */
      file: ArrayBuffer;
      /** Voxels of each label, background first. */
      counts: number[];
      voxelMl: number;
      seconds: number;
    }
  | { type: "error"; code: string; message: string };
