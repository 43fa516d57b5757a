/** A fault that a person can cause or cure, in the package's three facts: where, what was found, what to do. */
export class AppError extends Error {
  readonly code: string;
  readonly where: string;
  readonly fault: string;
  readonly remedy: string;

  constructor(code: string, where: string, fault: string, remedy: string) {
    super(`${where}: ${fault}; ${remedy}`);
    this.code = code;
    this.where = where;
    this.fault = fault;
    this.remedy = remedy;
  }
}

/** Bytes in the unit that a person reads best. */
export function sizeText(bytes: number): string {
  if (bytes >= 1 << 30) return `${(bytes / (1 << 30)).toFixed(1)} GiB`;
  return bytes >= 1 << 20 ? `${(bytes / (1 << 20)).toFixed(0)} MiB` : `${bytes} bytes`;
}
