"use strict";
// Zoom, values under the pointer, and tables that sort. A plot's viewBox is the range that is seen, and its paths hold
// the data themselves; without this script the page is complete, and still.
(() => {
  const SVG = document.querySelector("svg")?.namespaceURI, tip = document.getElementById("tip");
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const make = (name, attributes, parent) => {
    const one = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
    return parent.appendChild(one);
  };
  const number = v => v === 0 ? "0" : Math.abs(v) >= 1e-3 && Math.abs(v) < 1e6
    ? (Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(4))) : v.toExponential(2);
  const bytes = v => {
    for (const unit of ["B", "kB", "MB", "GB"]) { if (Math.abs(v) < 999.5) return +v.toPrecision(3) + " " + unit; v /= 1000; }
    return +v.toPrecision(3) + " TB";
  };
  const time = s => {
    const seconds = Math.round(s), minutes = Math.round(s / 60), left = seconds % 60;
    return s < 59.5 ? +s.toPrecision(3) + " s" : seconds < 3600 ? Math.floor(seconds / 60) + " min" + (left ? ` ${left} s` : "")
      : s < 172800 ? Math.floor(minutes / 60) + " h " + minutes % 60 + " min" : +(s / 86400).toPrecision(3) + " d";
  };
  const shown = (v, unit) => unit === "B" ? bytes(v) : unit === "s" ? (v ? time(v) : "0")
    : unit === "step" ? Math.round(v).toLocaleString("en") : number(v);
  const ticks = (low, high, most) => {
    const span = (high - low) / most, power = 10 ** Math.floor(Math.log10(span));
    const step = [1, 2, 5, 10].map(one => one * power).find(one => one >= span * .999), found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
    return found;
  };

  const timeTicks = (low, high, most) => {
    const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400];
    const step = high - low < 2 ? 0 : steps.find(one => (high - low) / one <= most), found = [];
    if (!step) return ticks(low, high, most);
    for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(n * step);
    return found;
  };

  const logTicks = (low, high) => { // of exponents: 1, 2 and 5 of each size, or sizes alone
    const found = [];
    for (let n = Math.floor(low); n <= high; n++) for (const one of high - low > 2 ? [1] : [1, 2, 5]) found.push(n + Math.log10(one));
    return found.filter(one => one >= low && one <= high);
  };

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.axes = figure.querySelector("svg.axes"); this.plot = figure.querySelector("svg.plot");
      const [x, y, w, h] = this.plot.getAttribute("viewBox").split(" ").map(Number);
      this.home = this.seen = [x, x + w, -y - h, -y];
      this.isLog = false; this.isBars = figure.classList.contains("bars");
      this.xUnit = figure.dataset.x; this.yUnit = figure.dataset.y;
      this.lines = all("path.line", this.plot).map(path => ({ path, label: path.dataset.label, points: null }));
      this.tools = document.createElement("span"); this.tools.className = "tools";
      figure.querySelector("figcaption").append(this.tools);
      this.reset = this.button("reset zoom", () => zoomAll(this, null)); this.reset.hidden = true;
      if (figure.classList.contains("log")) {
        const log = this.button("log", () => { this.isLog = !this.isLog; log.setAttribute("aria-pressed", this.isLog); this.redraw(); });
        log.setAttribute("aria-pressed", "false");
      }
      this.axes.addEventListener("pointermove", event => this.move(event));
      this.axes.addEventListener("pointerleave", () => this.leave());
      this.axes.addEventListener("pointerdown", event => this.press(event));
      this.axes.addEventListener("pointerup", event => this.release(event));
      this.axes.addEventListener("pointercancel", () => { this.from = undefined; this.leave(); });
      this.axes.addEventListener("dblclick", () => zoomAll(this, null));
      // what is between the lines is to be hit, too
      this.axes.insertBefore(make("rect", { class: "hit", width: "100%", height: "100%" }, this.axes), this.axes.firstChild);
    }
    button(text, act) {
      const one = document.createElement("button"); one.type = "button"; one.textContent = text;
      one.addEventListener("click", act); this.tools.append(one); return one;
    }
    points(line) {
      if (line.points) return line.points;
      let x = 0, y = 0; line.points = [];
      for (const [, kind, rest] of line.path.getAttribute("d").matchAll(/([MLHV])([^MLHV]*)/g)) {
        const values = rest.trim().split(/[ ,]+/).map(Number);
        if (kind === "H") { x = values[0]; continue; }
        if (kind === "V") y = values[0]; else [x, y] = values;
        line.points.push([x, y]);
      }
      line.isStep = line.path.getAttribute("d").includes("V");
      return line.points;
    }
    visible() { return this.lines.filter(line => !line.path.classList.contains("off")); }
    y(value) { return this.isLog ? Math.log10(value) : value; }
    zoom(left, right) {
      const home = this.home;
      if (left === null) { this.seen = home; } else {
        left = Math.max(left, home[0]); right = Math.min(right, home[1]);
        if (right - left < (home[1] - home[0]) / 500) return;
        this.seen = [left, right, home[2], home[3]];
      }
      this.reset.hidden = left === null;
      this.figure.classList.toggle("zoomed", left !== null);
      this.redraw();
    }
    redraw() {
      let [left, right, low, high] = this.seen;
      const isHome = this.seen === this.home;
      if (!this.isBars && (!isHome || this.isLog)) {
        const ys = [];
        for (const line of this.visible()) {
          const points = this.points(line);
          points.forEach(([x, y], n) => {
            const next = points[n + 1], before = points[n - 1];
            if ((x >= left || (next && next[0] >= left)) && (x <= right || (before && before[0] <= right))) ys.push(this.y(y));
          });
        }
        if (ys.length) {
          low = ys.reduce((a, b) => Math.min(a, b)); high = ys.reduce((a, b) => Math.max(a, b));
          const pad = .06 * (high - low) || Math.abs(high) * .1 || 1; low -= pad; high += pad;
        }
      }
      if (this.isLog !== this.drawnLog) {
        for (const line of this.lines) {
          const points = this.points(line);
          line.path.setAttribute("d", points.map(([x, y], n) => (n ? "L" : "M") + x + " " + this.y(y)).join(""));
        }
        for (const path of all("path.dots", this.plot)) {
          path.dataset.d ??= path.getAttribute("d");
          path.setAttribute("d", path.dataset.d.replace(/M(\S+) (\S+?)h0/g, (_, x, y) => `M${x} ${this.y(+y)}h0`));
        }
        this.drawnLog = this.isLog;
      }
      this.drawn = [left, right, low, high];
      this.plot.setAttribute("viewBox", `${left} ${-high} ${right - left} ${high - low}`);
      const percent = v => (100 * v).toFixed(2) + "%", gx = this.axes.querySelector("g.x"), gy = this.axes.querySelector("g.y");
      gx.replaceChildren();
      for (const v of (this.xUnit === "s" ? timeTicks : ticks)(left, right, 5)) {
        if (this.xUnit === "step" && v !== Math.round(v)) continue;
        const x = percent((v - left) / (right - left));
        make("line", { x1: x, x2: x, y1: 0, y2: "100%" }, gx);
        make("text", { x, y: "100%", dy: 16 }, gx).textContent = shown(v, this.xUnit);
      }
      if (this.isBars) return; // its rows have names
      gy.replaceChildren();
      for (const v of this.isLog ? logTicks(low, high) : ticks(low, high, 4)) {
        const y = percent((high - v) / (high - low));
        make("line", { x1: 0, x2: "100%", y1: y, y2: y }, gy);
        make("text", { x: -8, y, dy: 4 }, gy).textContent = shown(this.isLog ? 10 ** v : v, this.yUnit);
      }
      const ends = this.axes.querySelector(".ends"); // labels stand where the lines end in the whole picture
      if (ends) ends.setAttribute("display", isHome && !this.isLog ? "" : "none");
    }
    place(event) {
      const box = this.plot.getBoundingClientRect(), [left, right, low, high] = this.drawn || this.home;
      const fx = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)), fy = (event.clientY - box.top) / box.height;
      return { x: left + fx * (right - left), fy, scale: box.height / (high - low), high, box };
    }
    move(event) {
      const at = this.place(event), [left, right, low, high] = this.drawn || this.home;
      if (this.from !== undefined) {
        const x = Math.min(this.from, at.x), w = Math.abs(at.x - this.from);
        this.brush ??= make("rect", { class: "brush" }, this.plot);
        for (const [key, value] of Object.entries({ x, y: -high, width: w, height: high - low })) this.brush.setAttribute(key, value);
      }
      const near = [];
      for (const line of this.visible()) {
        const points = this.points(line);
        let a = 0, b = points.length - 1;
        while (a < b) { const m = (a + b) >> 1; if (points[m][0] < at.x) a = m + 1; else b = m; }
        if (a > 0 && (line.isStep ? points[a][0] > at.x : at.x - points[a - 1][0] < points[a][0] - at.x)) a--;
        const [x, y] = points[a];
        near.push({ line, x, y, far: Math.abs((high - this.y(y)) * at.scale - at.fy * at.box.height) });
      }
      if (!near.length) return;
      const best = near.reduce((one, other) => other.far < one.far ? other : one);
      const said = near.length > 4 ? [best] : near;
      this.cross ??= make("path", { class: "cross" }, this.plot);
      this.cross.setAttribute("d", `M${best.x} ${-high}V${-low}`);
      const where = x => (this.xUnit === "step" ? "step " : "") + shown(x, this.xUnit);
      tip.textContent = [where(best.x), ...said.map(({ line, x, y }) => (line.label ? line.label + ": " : "") + shown(y, this.yUnit)
        + (x === best.x || line.isStep ? "" : ` (${where(x)})`))].join("\n");
      tip.hidden = false;
      const wide = tip.offsetWidth;
      tip.style.left = Math.max(4, event.clientX + 16 + wide > innerWidth ? event.clientX - wide - 16 : event.clientX + 16) + "px";
      tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 12) + "px";
      if (near.length > 4) light(best.line.path);
    }
    leave() { tip.hidden = true; this.cross?.remove(); this.cross = undefined; this.brush?.remove(); this.brush = undefined; light(null); }
    press(event) { if (event.button === 0) { this.from = this.place(event).x; this.axes.setPointerCapture(event.pointerId); } }
    release(event) {
      const from = this.from, to = this.place(event).x, [left, right] = this.drawn || this.home;
      this.from = undefined; this.brush?.remove(); this.brush = undefined;
      if (from !== undefined && Math.abs(to - from) > (right - left) / 60) zoomAll(this, [Math.min(from, to), Math.max(from, to)]);
    }
  }

  const charts = all("figure.lines, figure.bars").map(figure => new Chart(figure));
  // charts over the same axis, within the same run, move together
  const zoomAll = (one, range) => charts.filter(other => other.xUnit === one.xUnit && other.figure.closest("details.run") === one.figure.closest("details.run"))
    .forEach(other => range ? other.zoom(...range) : other.zoom(null));
  const keyOf = element => [...element.classList].find(name => /^k\d+$/.test(name));
  const light = path => {
    const key = path && keyOf(path);
    all(".hot").forEach(one => one.classList.remove("hot"));
    charts.forEach(chart => chart.plot.classList.toggle("dim", Boolean(key)));
    if (key) all(`.plot .${key}, tr.${key}`).forEach(one => one.classList.add("hot"));
  };
  for (const row of all("table.runs tbody tr")) {
    row.addEventListener("pointerenter", () => light(row));
    row.addEventListener("pointerleave", () => light(null));
    row.addEventListener("click", event => {
      if (event.target.closest("a")) return;
      const off = row.classList.toggle("off");
      all(`.plot .${keyOf(row)}`).forEach(path => path.classList.toggle("off", off));
    });
    row.title = "click: hide or show its curves";
  }
  for (const table of all("table.sortable")) {
    all("th", table).forEach((head, column) => head.addEventListener("click", () => {
      const isDown = head.getAttribute("aria-sort") === "ascending";
      all("th", table).forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
      const value = row => { const cell = row.cells[column]; return cell.dataset.v === undefined ? (head.classList.contains("n") ? NaN : cell.textContent) : +cell.dataset.v; };
      const order = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (typeof x === "number") return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : isDown ? y - x : x - y;
        return isDown ? y.localeCompare(x) : x.localeCompare(y);
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
    }));
  }
})();
