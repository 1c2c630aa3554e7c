"use strict";
// What the report's data files call, and how they are fetched: as scripts, which also load from a disk.

const byId = (id) => document.getElementById(id);

const data = {
  index: null,
  pages: new Map(), // number -> rows
  motions: new Map(), // id -> {grid, moves}
  loading: new Map(), // path -> Promise
  filesLoaded: 0,

  load(path) {
    if (!this.loading.has(path)) {
      this.loading.set(path, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = path;
        script.onload = () => {
          this.filesLoaded += 1;
          resolve();
        };
        script.onerror = () => {
          this.loading.delete(path); // the next view may try again
          reject(new Error(`${path} cannot be loaded: was the report's folder copied as a whole?`));
        };
        document.head.append(script);
      }));
    }
    return this.loading.get(path);
  },

  // All that is known of some rows, by their places in the index.
  async rows(places) {
    const size = this.index.rowsPerPage;
    const numbers = [...new Set(places.map((place) => Math.floor(place / size)))];
    await Promise.all(numbers.map((number) => this.load(this.index.pages[number])));
    return places.map((place) => this.pages.get(Math.floor(place / size))[place % size]);
  },

  // A motion's grid and moves, or null where the report has none.
  async motion(id) {
    if (!this.hasMotion.has(id)) return null;
    await this.load(`motions/${id}.js`);
    return this.motions.get(id);
  },
};

window.ditflowReport = {
  index(index) {
    data.index = index;
    data.hasMotion = new Set(index.motions);
    start();
  },
  page(number, rows) {
    data.pages.set(number, rows);
  },
  motion(id, { grid, unit, moves }) {
    const bytes = Uint8Array.from(atob(moves), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    const numbers = Float32Array.from({ length: bytes.length / 2 }, (_, n) => view.getInt16(2 * n, true) / unit);
    data.motions.set(id, { grid, moves: numbers });
  },
  // For whoever wants to know how much was loaded.
  get filesLoaded() {
    return data.filesLoaded;
  },
};

// An element with a class, a text and children. Texts of others only ever become text nodes.
function make(tag, className = "", ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content.filter((part) => part !== null && part !== undefined));
  return element;
}

function drawn(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(1);
  return String(Number(value.toPrecision(digits)));
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 5400) return `${number(value / 3600)} h`;
  return value >= 90 ? `${number(value / 60)} min` : `${number(value)} s`;
}

const words = (name) => name.replaceAll("_", " ");
