"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const percent = (share) => (100 * share).toFixed(share > 0.995 && share < 1 ? 2 : 1) + " %";
  const count = (n) => n.toLocaleString("en");
  const whole = data.task === "classification";
  const said = (value) => (whole ? data.classes[value] : value) || "(no name)";
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /* Pictures: those of the script, or the ones that stand in the page. */
  const inPage = new Map();
  for (const image of document.querySelectorAll("img[data-row]")) inPage.set(image.dataset.row, image);
  const picture = (i) => {
    const row = String(data.rows[i]);
    return data.pictures[row] || (inPage.has(row) ? inPage.get(row).src : null);
  };
  const sure = (i) => (data.sure[i] === null ? "" : ` (${percent(data.sure[i])})`);
  const brief = (text) => (text.length > 60 ? text.slice(0, 59) + "…" : text);
  const judgement = (i) => {
    const [truth, predicted] = [brief(said(data.true[i])), brief(said(data.predicted[i]))];
    if (data.task === "regression") return `predicted ${predicted}, true ${truth}`;
    if (data.right[i]) return `${predicted}${sure(i)}, rightly`;
    return `${predicted}${sure(i)}, labelled ${truth}`;
  };

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const named = (text) => {
    const made = element("bdi", "name", text);
    made.title = text;
    return made;
  };

  /* Charts, by Observable Plot; redrawn when the width changes. Colours are the page's own variables. */
  const charts = {
    reliability: (width) => ({
      width, height: 300, marginLeft: 45, marginBottom: 40, inset: 4,
      x: { domain: [0, 1], label: "how sure it is", tickFormat: "%" },
      y: { domain: [0, 1], label: "how often it is right", tickFormat: "%", grid: true },
      r: { range: [2, 9] },
      marks: [
        Plot.line([[0, 0], [1, 1]], { stroke: "var(--muted)", strokeDasharray: "4 4" }),
        Plot.ruleX(data.reliability, { x: "confidence", y1: "low", y2: "high", stroke: "var(--right)", strokeWidth: 2 }),
        Plot.line(data.reliability, { x: "confidence", y: "share", stroke: "var(--right)" }),
        Plot.dot(data.reliability, { x: "confidence", y: "share", r: "rows", fill: "var(--right)", stroke: "var(--paper)",
          channels: { images: "rows" }, tip: { format: { r: false }, fill: "var(--paper)" } }),
      ],
    }),
    threshold: (width) => {
      const now = Number(byId("threshold").value);
      const many = data.task === "multilabel";
      const last = data.threshold[data.threshold.length - 1];
      const names = many ? ["recall", "precision"] : ["answered", "right"];
      return {
        width, height: 260, marginLeft: 45, marginRight: 70, marginBottom: 40, inset: 4,
        x: { domain: [0, 1], label: "threshold", tickFormat: "%" },
        y: { domain: [0, 1], label: null, tickFormat: "%", grid: true },
        marks: [
          many ? null : Plot.areaY(data.threshold, { x: "threshold", y1: "low", y2: "high", fill: "var(--right)", fillOpacity: 0.2 }),
          Plot.line(data.threshold, { x: "threshold", y: "right", stroke: "var(--right)", strokeWidth: 2 }),
          Plot.line(data.threshold, { x: "threshold", y: "answered", stroke: "var(--wrong)", strokeWidth: 2, strokeDasharray: "6 3" }),
          Plot.text([last], { x: "threshold", y: "right", text: () => names[1], textAnchor: "start", dx: 6, dy: last.right >= last.answered ? -5 : 5, fill: "var(--right)" }),
          Plot.text([last], { x: "threshold", y: "answered", text: () => names[0], textAnchor: "start", dx: 6, dy: last.right >= last.answered ? 5 : -5, fill: "var(--wrong)" }),
          Plot.ruleX([now], { stroke: "var(--ink)" }),
        ],
      };
    },
    learning: (width) => {
      const { measured, ahead } = data.learning;
      const last = measured[measured.length - 1];
      const format = data.task === "regression" ? undefined : "%";
      return {
        width, height: 280, marginLeft: 50, marginBottom: 40, inset: 8,
        x: { type: "log", label: "training images", ticks: measured.map((p) => p.size).concat(ahead.size), tickFormat: "~s" },
        y: { label: "error", tickFormat: format, grid: true, zero: true },
        marks: [
          Plot.ruleX(measured, { x: "size", y1: "low", y2: "high", stroke: "var(--right)", strokeWidth: 2 }),
          Plot.line(measured, { x: "size", y: "error", stroke: "var(--right)", strokeWidth: 2 }),
          Plot.dot(measured, { x: "size", y: "error", fill: "var(--right)", r: 4, tip: { fill: "var(--paper)" } }),
          Plot.line([last, ahead], { x: "size", y: "error", stroke: "var(--wrong)", strokeDasharray: "4 4" }),
          Plot.ruleX([ahead], { x: "size", y1: "low", y2: "high", stroke: "var(--wrong)", strokeWidth: 6, strokeOpacity: 0.4 }),
          Plot.dot([ahead], { x: "size", y: "error", stroke: "var(--wrong)", fill: "var(--paper)", r: 5, symbol: "diamond", tip: { fill: "var(--paper)" } }),
        ],
      };
    },
    sets: (width) => ({
      width, height: 260, marginLeft: 45, marginBottom: 40, inset: 4,
      x: { domain: [0.5, 1], label: "asked for", tickFormat: "%" },
      y: { domain: [0.5, 1], label: "sets that hold the right answer", tickFormat: "%", grid: true },
      marks: [
        Plot.line([[0, 0], [1, 1]], { stroke: "var(--muted)", strokeDasharray: "4 4", clip: true }),
        Plot.ruleX(data.sets, { x: "level", y1: "low", y2: "high", stroke: "var(--right)", strokeWidth: 2, clip: true }),
        Plot.dot(data.sets, { x: "level", y: "coverage", fill: "var(--right)", r: 5, channels: { "mean size": "size" }, tip: { fill: "var(--paper)" } }),
      ],
    }),
    novelty: (width) => ({
      width, height: 260, marginLeft: 45, marginBottom: 40, inset: 4,
      x: { domain: [0, 1], label: "novelty: share of training-like images that look less new", tickFormat: "%" },
      y: { label: "share of the images", tickFormat: "%", grid: true },
      marks: [
        Plot.rectY(data.novelty, { x1: "from", x2: "to", y: "share", fill: "var(--right)", insetRight: 1, tip: { fill: "var(--paper)" } }),
        Plot.ruleY([data.novelty.length ? 1 / data.novelty.length : 0], { stroke: "var(--muted)", strokeDasharray: "4 4" }),
      ],
    }),
  };
  const draw = (holder) => {
    const width = Math.max(240, Math.floor(holder.clientWidth));
    const options = charts[holder.dataset.chart](width);
    const made = Plot.plot({ ...options, className: "drawn", style: { background: "none", fontSize: "12px" } });
    for (const sheet of made.querySelectorAll("style")) sheet.remove(); /* its rules are in the page's own style sheet */
    holder.replaceChildren(made);
  };
  const holders = [...document.querySelectorAll("[data-chart]")].filter((holder) => data[holder.dataset.chart]);
  const redraw = () => holders.forEach(draw);

  /* The threshold. */
  const slider = byId("threshold");
  const decide = () => {
    const now = Number(slider.value);
    byId("threshold-value").textContent = now.toFixed(2);
    const at = data.threshold.filter((point) => point.threshold <= now + 1e-9).pop() || data.threshold[0];
    const none = now > data.threshold[data.threshold.length - 1].threshold + 0.005;
    let text = `${percent(at.answered)} of the images are answered (${count(at.rows)}), ${percent(at.right)} of them rightly; ${count(at.wrong)} mistakes are left.`;
    if (data.task === "multilabel") text = `${count(at.rows)} labels are given: precision ${percent(at.right)}, recall ${percent(at.answered)}; ${count(at.wrong)} are wrong.`;
    byId("threshold-outcome").textContent = none ? "No image is answered." : text;
    const holder = document.querySelector("[data-chart=threshold]");
    draw(holder);
  };
  if (slider && data.threshold) slider.addEventListener("input", decide);

  /* The images of a cell. */
  const dialog = byId("dialog");
  const MOST = 60;
  const figure = (i) => {
    const made = element("figure", data.right[i] ? "" : "mistake");
    const frame = element("div", "frame");
    const source = picture(i);
    if (source) {
      const image = element("img");
      image.alt = "";
      image.src = source;
      frame.append(image);
    } else frame.append(element("span", "absent", "no picture"));
    const caption = element("figcaption");
    const first = element("span", "said");
    first.append(named(said(data.predicted[i])), element("span", "p", data.sure[i] === null ? "" : percent(data.sure[i])));
    const last = element("span", "id");
    last.append(named(data.ids[i]));
    caption.append(first, last);
    made.append(frame, caption);
    return made;
  };
  const open = (cell, shown) => {
    const [truth, predicted] = cell.dataset.cell.split(",").map(Number);
    const here = [];
    for (let i = 0; i < data.ids.length; i++) if (data.true[i] === truth && data.predicted[i] === predicted) here.push(i);
    here.sort((a, b) => (picture(b) !== null) - (picture(a) !== null) || data.sure[b] - data.sure[a]);
    const title = byId("dialog-title");
    title.replaceChildren(named(said(truth)), truth === predicted ? " rightly named" : " taken for ", ...(truth === predicted ? [] : [named(said(predicted))]));
    const pictured = here.filter((i) => picture(i) !== null).length;
    const most = Math.min(here.length, MOST);
    byId("dialog-about").textContent = `${most < shown ? `${count(most)} of ${count(shown)}` : count(shown)} image${shown === 1 ? "" : "s"}, the surest first${pictured < most ? `; ${count(pictured)} with a picture` : ""}.`;
    byId("dialog-gallery").replaceChildren(...here.slice(0, MOST).map(figure));
    dialog.showModal();
    byId("dialog-close").focus();
  };
  if (dialog) {
    byId("dialog-close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    for (const cell of document.querySelectorAll("[data-cell]")) {
      const shown = Number(cell.firstChild.textContent.replaceAll(",", ""));
      if (cell.tagName !== "BUTTON") cell.setAttribute("role", "button");
      cell.addEventListener("click", () => open(cell, shown));
      cell.addEventListener("keydown", (event) => {
        if (cell.tagName !== "BUTTON" && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); open(cell, shown); }
      });
    }
  }

  /* The map: a canvas, because ten thousand points in SVG are slow, and cannot be walked with the arrow keys. */
  const canvas = byId("map-canvas");
  const card = byId("map-card");
  const palette = d3.schemeObservable10 || d3.schemeTableau10;
  const colour = byId("map-colour");
  const only = byId("map-class");
  const several = data.classes.length > 1;
  const state = { at: -1, spots: [], shown: [] };
  const option = (value, text) => { const made = element("option", "", text); made.value = value; return made; };
  const setUp = () => {
    const few = whole && data.classes.length <= palette.length;
    if (data.task !== "regression") colour.append(option("right", "right and wrong"));
    if (few) colour.append(option("class", "true class"));
    if (data.task === "regression") colour.append(option("plain", "one"));
    if (data.sure.some((value) => value !== null)) colour.append(option("sure", "how sure"));
    if (data.new) colour.append(option("new", "how new"));
    if (few) colour.value = "class";
    only.append(option("", "all images"));
    if (data.task !== "regression") only.append(option("wrong", "mistakes"));
    if (whole && several) data.classes.forEach((name, i) => only.append(option(String(i), (name || "(no name)").slice(0, 60))));
  };
  const visible = (i) => only.value === "" || (only.value === "wrong" ? !data.right[i] : data.true[i] === Number(only.value));
  const paint = (i) => {
    if (colour.value === "class") return palette[data.true[i]];
    if (colour.value === "sure") return d3.interpolateLab(style("--wrong"), style("--right"))(data.sure[i]);
    if (colour.value === "new") return d3.interpolateLab(style("--right"), style("--wrong"))(data.new[i] ** 3);
    return data.right[i] ? style("--right") : style("--wrong");
  };
  const map = () => {
    const width = canvas.parentElement.clientWidth;
    const height = Math.min(560, Math.max(300, Math.round(width * 0.62)));
    const scale = window.devicePixelRatio || 1;
    canvas.width = width * scale;
    canvas.height = height * scale;
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const x = d3.scaleLinear([-1.1, 1.1], [10, width - 10]);
    const y = d3.scaleLinear([-1.1, 1.1], [height - 10, 10]);
    state.spots = data.x.map((value, i) => [x(value), y(data.y[i])]);
    const indices = d3.range(data.ids.length);
    state.shown = indices.filter(visible);
    const size = data.ids.length > 3000 ? 2 : data.ids.length > 600 ? 3 : 4;
    const dot = (i, radius) => { pen.beginPath(); pen.arc(state.spots[i][0], state.spots[i][1], radius, 0, 7); };
    pen.globalAlpha = 0.12;
    pen.fillStyle = style("--muted");
    for (const i of indices) if (!visible(i)) { dot(i, size); pen.fill(); }
    const ringed = colour.value === "class";
    const order = [...state.shown].sort((a, b) => data.right[b] - data.right[a]);
    for (const i of order) {
      pen.globalAlpha = data.right[i] || data.task === "regression" ? 0.55 : 0.95;
      pen.fillStyle = paint(i);
      dot(i, size);
      pen.fill();
      if (ringed && !data.right[i]) { pen.strokeStyle = style("--ink"); pen.lineWidth = 1.5; dot(i, size + 1); pen.stroke(); }
    }
    if (state.at >= 0) {
      pen.globalAlpha = 1;
      pen.strokeStyle = style("--ink");
      pen.lineWidth = 2.5;
      dot(state.at, size + 5);
      pen.stroke();
    }
    legend();
  };
  const legend = () => {
    const holder = byId("map-legend");
    const key = (shade, text) => {
      const made = element("span", "keyed");
      const spot = element("i", "spot");
      spot.style.backgroundColor = shade;
      made.append(spot, named(text));
      return made;
    };
    if (colour.value === "class") holder.replaceChildren(...data.classes.map((name, i) => key(palette[i], said(i))), element("span", "keyed", "ringed: mistaken"));
    else if (colour.value === "sure") holder.replaceChildren(key(style("--right"), "sure"), key(style("--wrong"), "unsure"));
    else if (colour.value === "new") holder.replaceChildren(key(style("--right"), "like training"), key(style("--wrong"), "new"));
    else if (colour.value === "right") holder.replaceChildren(key(style("--right"), "right"), key(style("--wrong"), "wrong"));
    else holder.replaceChildren();
  };
  const show = (i) => {
    state.at = i;
    card.hidden = i < 0;
    if (i >= 0) {
      const source = picture(i);
      const image = byId("map-picture");
      image.hidden = source === null;
      if (source !== null) image.src = source;
      const text = byId("map-said");
      text.replaceChildren(element("b", "", judgement(i)), element("br"), named(data.ids[i]));
      const [px, py] = state.spots[i];
      const room = canvas.clientWidth - card.offsetWidth - 8;
      card.style.left = `${Math.max(0, Math.min(px + 14, room))}px`;
      card.style.top = `${Math.max(0, py + (py > canvas.clientHeight / 2 ? -card.offsetHeight - 14 : 14))}px`;
    }
    map();
  };
  const nearestTo = (px, py, reach) => {
    let best = -1;
    let least = reach * reach;
    for (const i of state.shown) {
      const [sx, sy] = state.spots[i];
      const far = (sx - px) ** 2 + (sy - py) ** 2;
      if (far < least) { least = far; best = i; }
    }
    return best;
  };
  const step = (dx, dy) => {
    if (state.at < 0) return nearestTo(canvas.clientWidth / 2, canvas.clientHeight / 2, Infinity);
    const [px, py] = state.spots[state.at];
    let best = state.at;
    let least = Infinity;
    for (const i of state.shown) {
      if (i === state.at) continue;
      const along = (state.spots[i][0] - px) * dx + (state.spots[i][1] - py) * dy;
      const aside = Math.abs((state.spots[i][0] - px) * dy) + Math.abs((state.spots[i][1] - py) * dx);
      if (along > 0 && along + 2 * aside < least && aside <= along) { least = along + 2 * aside; best = i; }
    }
    return best;
  };
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const watch = () => {
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const found = nearestTo(event.clientX - box.left, event.clientY - box.top, 24);
      if (found !== state.at) show(found);
    });
    canvas.addEventListener("pointerleave", () => show(-1));
    canvas.addEventListener("focus", () => { if (state.at < 0 && canvas.matches(":focus-visible")) show(step(0, 0)); });
    canvas.addEventListener("blur", () => show(-1));
    canvas.addEventListener("keydown", (event) => {
      if (event.key === "Escape") show(-1);
      if (!(event.key in ways)) return;
      event.preventDefault();
      show(step(...ways[event.key]));
    });
    for (const control of [colour, only]) control.addEventListener("change", () => show(-1));
  };

  const all = () => {
    redraw();
    if (slider && data.threshold) decide();
    if (canvas) map();
  };
  document.documentElement.classList.add("scripted");
  if (canvas) { setUp(); watch(); }
  all();
  let waiting = 0;
  let drawnAt = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === drawnAt) return;
    drawnAt = window.innerWidth;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(all);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  window.addEventListener("beforeprint", () => { if (canvas) show(-1); });
})();
