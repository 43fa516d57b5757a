/** What an organ is called in DICOM objects: coded concepts, labels, colours; `io/dicom/codes.py` once more. */
import type { Triple } from "./grid.ts";
import type { Organ } from "./model.ts";
import { sha256 } from "./sha256.ts";

export type Code = [value: string, scheme: string, meaning: string];

/** *Source*: DICOM PS3.16, CID 7150 and CID 244. */
export const ANATOMICAL_STRUCTURE: Code = ["91723000", "SCT", "Anatomical structure"];
const SIDES: Record<string, Code> = { right: ["24028007", "SCT", "Right"], left: ["7771000", "SCT", "Left"] };
/** Concepts of the label table that name an organ of either side. */
const EITHER_SIDE = new Set(["45289007"]);
const BASE32 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
/** sRGB to XYZ and the white of both, as `io/dicom/codes.py` has them. */
const RGB_TO_XYZ_D50 = [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169],
  [0.0139322, 0.0971045, 0.7141733]] as const;
const WHITE_D50 = [0.96422, 1, 0.82521] as const;

/** The name of an organ as a person reads it, at most 64 characters, without what DICOM texts may not have. */
export function organText(name: string): string {
  const words = name.replaceAll("_", " ").replace(/[\\^=]|[^\P{C}]|[\p{Zl}\p{Zp}]/gu, " ").split(/\s+/).filter(Boolean);
  const text = [...words.join(" ")].slice(0, 64).join("").trim();
  return text ? text[0]!.toUpperCase() + text.slice(1) : "Organ";
}

export function organCode({ name, snomed }: Organ): Code {
  const text = organText(name);
  if (snomed) return [snomed, "SCT", text];
  return [ownCode(name), "99AUTOSAM3D", text];
}

/** A code for a name, another one for every other name: its own letters where they fit, else as many as fit before 40
 * bits of its SHA-256 (RFC 4648, base 32). */
function ownCode(name: string): string {
  if (/^[a-z0-9_]{1,16}$/.test(name)) return name.toUpperCase();
  const bits = sha256(new TextEncoder().encode(name)).subarray(0, 5).reduce((sum, byte) => (sum << 8n) | BigInt(byte), 0n);
  const digest = Array.from({ length: 8 }, (_, i) => BASE32[Number((bits >> BigInt(35 - 5 * i)) & 31n)]).join("");
  return `${[...organText(name).toUpperCase().replaceAll(" ", "_")].slice(0, 7).join("")}_${digest}`;
}

/** The code of the side, where the organ's own code does not say it. */
export function organSide({ name, snomed }: Organ): Code | null {
  if (!snomed || !EITHER_SIDE.has(snomed)) return null;
  const words = name.toLowerCase().split("_");
  return Object.entries(SIDES).find(([side]) => words.includes(side))?.[1] ?? null;
}

/** A colour as DICOM's RecommendedDisplayCIELabValue: three numbers of 16 bits. */
export function cielab(rgb: Triple): number[] {
  const linear = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  const [x, y, z] = RGB_TO_XYZ_D50.map((row, i) =>
    curve(row.reduce((sum, a, k) => sum + a * linear[k]!, 0) / WHITE_D50[i]!)) as [number, number, number];
  const lab = [116 * y - 16, 500 * (x - y), 200 * (y - z)];
  // L* of 0 to 100 and a*, b* of -128 to 127, each over 0 to 65535. *Source*: PS3.3 C.10.7.1.1.
  return lab.map((v, i) => Math.min(65535, Math.max(0, Math.round(i ? ((v + 128) * 65535) / 255 : (v * 65535) / 100))));
}

function curve(t: number): number {
  return t > (6 / 29) ** 3 ? Math.cbrt(t) : t / (3 * (6 / 29) ** 2) + 4 / 29;
}
