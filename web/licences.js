// The licences of what is bundled, as their owners ask for it. A few packages name a licence and carry no text of it:
// they get the licence's own words with the owner that their repository names, letter by letter. What sits inside them
// without being a package of its own follows. `licences/` holds what no package here carries: OpenJPEG's LICENSE (2.5)
// and the ThirdPartyNotices.txt of ONNX Runtime's release, which its Python package of the same version ships.
import { readdirSync, readFileSync } from "node:fs";

const OWNERS = {
  "@cornerstonejs/codec-openjpeg": "Chris Hafey.",
  "@niivue/niivue": "2021, Niivue",
  "onnxruntime-common": "Microsoft Corporation",
  "onnxruntime-web": "Microsoft Corporation",
  "guid-typescript": "nicolas",
};
const WARRANTY = `THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL
THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT,
TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.`;
const TEXTS = {
  MIT: `Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

${WARRANTY}
`,
  ISC: `Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby
granted, provided that the above copyright notice and this permission notice appear in all copies.

THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES WITH REGARD TO THIS SOFTWARE INCLUDING ALL
IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS. IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR ANY SPECIAL, DIRECT,
INDIRECT, OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN AN
ACTION OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF OR IN CONNECTION WITH THE USE OR PERFORMANCE OF
THIS SOFTWARE.
`,
  "BSD-2-Clause": `All rights reserved.

Redistribution and use in source and binary forms, with or without modification, are permitted provided that the
following conditions are met:

1. Redistributions of source code must retain the above copyright notice, this list of conditions and the following
   disclaimer.

2. Redistributions in binary form must reproduce the above copyright notice, this list of conditions and the following
   disclaimer in the documentation and/or other materials provided with the distribution.

THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS" AND ANY EXPRESS OR IMPLIED WARRANTIES,
INCLUDING, BUT NOT LIMITED TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE
DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL,
SPECIAL, EXEMPLARY, OR CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR
SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER CAUSED AND ON ANY THEORY OF LIABILITY,
WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE OF
THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
`,
};
const read = (path) => readFileSync(path, "utf8");

/** The notice in a comment of a package's source, which the built page has lost. */
function comment(path, start) {
  const text = read(path), from = text.indexOf(start), to = text.indexOf("*/", from);
  if (from < 0 || to < 0) throw new Error(`${path}: no notice that begins with ${start}`);
  return text.slice(from, to);
}

/** Inside a package's files, and not among its dependencies: name, licence, notice with the licence's text. */
function inside() {
  const viewer = "node_modules/@niivue/niivue/src";
  const { version } = JSON.parse(read("node_modules/onnxruntime-web/package.json"));
  return [
    ["papaya (inside @niivue/niivue)", "BSD-3-Clause",
      comment(`${viewer}/nvmesh-utilities.ts`, "Copyright (c) 2012-2015")],
    ["base64 (inside @niivue/niivue)", "MIT",
      comment(`${viewer}/nvutilities.ts`, "https://gist.github.com/jonleighton")],
    ["nibabel, in part (inside @niivue/niivue)", "MIT", `\
Copyright (c) 2009-2019 Matthew Brett <matthew.brett@gmail.com>
Copyright (c) 2010-2013 Stephan Gerhard <git@unidesign.ch>
Copyright (c) 2006-2014 Michael Hanke <michael.hanke@gmail.com>
Copyright (c) 2011 Christian Haselgrove <christian.haselgrove@umassmed.edu>
Copyright (c) 2010-2011 Jarrod Millman <jarrod.millman@gmail.com>
Copyright (c) 2011-2019 Yaroslav Halchenko <debian@onerussian.com>
Copyright (c) 2015-2019 Chris Markiewicz <effigies@gmail.com>

${TEXTS.MIT}`],
    ["conform.py of FastSurfer, growcut.js and the font Roboto (inside @niivue/niivue, each changed)", "Apache-2.0", `\
conform.py: Copyright 2019 AI in Medical Imaging, German Center for Neurodegenerative Diseases (DZNE), Bonn
growcut.js: Steve Pieper 2022: Apache License 2.0
Roboto: Copyright 2011 Google Inc. All Rights Reserved.

${read("node_modules/flatbuffers/LICENSE")}`],
    ["openjpeg (inside @cornerstonejs/codec-openjpeg)", "BSD-2-Clause", read("licences/openjpeg.txt")],
    ["emscripten (inside @cornerstonejs/codec-openjpeg and onnxruntime-web)", "MIT", `\
Copyright (c) 2010-2014 Emscripten authors, see AUTHORS file.
Copyright Joyent, Inc. and other Node contributors. All rights reserved.

${TEXTS.MIT}`],
    ["musl (inside @cornerstonejs/codec-openjpeg and onnxruntime-web)", "MIT", `\
Copyright © 2005-2020 Rich Felker, et al.

Much of the math library code (src/math/* and src/complex/*) is
Copyright © 1993,2004 Sun Microsystems or
Copyright © 2003-2011 David Schultz or
Copyright © 2003-2009 Steven G. Kargl or
Copyright © 2003-2009 Bruce D. Evans or
Copyright © 2008 Stephen L. Moshier or
Copyright © 2017-2018 Arm Limited
and labelled as such in comments in the individual source files. All
have been licensed under extremely permissive terms.

${TEXTS.MIT}`],
    ["third parties inside onnxruntime-web", "each its own", `\
The notices of ONNX Runtime ${version}, of all its builds; the page's contain a part of them. Eigen is under the Mozilla
Public License 2.0, and its source at https://gitlab.com/libeigen/eigen; the version of each part stands in
https://github.com/microsoft/onnxruntime/blob/v${version}/cmake/deps.txt.

${read(`licences/onnxruntime-${version}.txt`)}`],
  ];
}

/** All of them as one text; fails where one has none. */
export function licences() {
  const names = Object.entries(JSON.parse(read("package-lock.json")).packages)
    .filter(([path, entry]) => path && !entry.dev && !entry.optional).map(([path]) => path);
  return [...names.map((path) => {
    const { name, version, license } = JSON.parse(read(`${path}/package.json`));
    const file = readdirSync(path).find((entry) => /^licen[cs]e/i.test(entry));
    const own = OWNERS[name] && TEXTS[license] && `Copyright (c) ${OWNERS[name]}\n\n${TEXTS[license]}`;
    if (!file && !own) throw new Error(`${name}: no text of its licence, ${license}`);
    return `${name} ${version} (${license})\n\n${file ? read(`${path}/${file}`) : own}`;
  }), ...inside().map(([name, license, text]) => `${name} (${license})\n\n${text}`)].join(`\n${"-".repeat(80)}\n\n`);
}
