"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const percent = (share) => (100 * share).toFixed(share > 0.995 && share < 1 ? 2 : 1) + " %";
  const formatCount = (n) => n.toLocaleString("en");
  const isClassification = data.task === "classification";
  const isRegression = data.task === "regression";
  const isMultilabel = data.task === "multilabel";
  const toName = (value) => (isClassification ? data.classes[value] : value) || "(no name)";
  const cssVariable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /* Images: those in the data of the script, or those that the page shows. */
  const imagesInPage = new Map();
  for (const image of document.querySelectorAll("img[data-row]")) imagesInPage.set(image.dataset.row, image);
  const imageSource = (i) => {
    const row = String(data.rows[i]);
    return data.pictures[row] || (imagesInPage.has(row) ? imagesInPage.get(row).src : null);
  };
  const formatConfidence = (i) => (data.sure[i] === null ? "" : ` (${percent(data.sure[i])})`);
  const truncate = (text) => (text.length > 60 ? text.slice(0, 59) + "…" : text);
  const describe = (i) => {
    const [label, predicted] = [truncate(toName(data.true[i])), truncate(toName(data.predicted[i]))];
    if (isRegression) return `predicted ${predicted}, true ${label}`;
    if (data.right[i]) return `${predicted}${formatConfidence(i)}, correct`;
    return `${predicted}${formatConfidence(i)}, labelled ${label}`;
  };

  const createElement = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const createName = (text) => {
    const element = createElement("bdi", "name", text);
    element.title = text;
    return element;
  };

  /* Charts, by Observable Plot; drawn again when the width changes. Colours are the page's own variables. */
  const charts = {
    reliability: (width) => ({
      width, height: 300, marginLeft: 45, marginBottom: 40, inset: 4,
      x: { domain: [0, 1], label: "confidence", tickFormat: "%" },
      y: { domain: [0, 1], label: "accuracy", tickFormat: "%", grid: true },
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
      const threshold = Number(byId("threshold").value);
      const last = data.threshold[data.threshold.length - 1];
      const [answeredLabel, correctLabel] = isMultilabel ? ["recall", "precision"] : ["answered", "accuracy"];
      const side = last.right >= last.answered ? 1 : -1;
      return {
        width, height: 260, marginLeft: 45, marginRight: 70, marginBottom: 40, inset: 4,
        x: { domain: [0, 1], label: "threshold", tickFormat: "%" },
        y: { domain: [0, 1], label: null, tickFormat: "%", grid: true },
        marks: [
          isMultilabel ? null : Plot.areaY(data.threshold, { x: "threshold", y1: "low", y2: "high", fill: "var(--right)", fillOpacity: 0.2 }),
          Plot.line(data.threshold, { x: "threshold", y: "right", stroke: "var(--right)", strokeWidth: 2 }),
          Plot.line(data.threshold, { x: "threshold", y: "answered", stroke: "var(--wrong)", strokeWidth: 2, strokeDasharray: "6 3" }),
          Plot.text([last], { x: "threshold", y: "right", text: () => correctLabel, textAnchor: "start", dx: 6, dy: -5 * side, fill: "var(--right)" }),
          Plot.text([last], { x: "threshold", y: "answered", text: () => answeredLabel, textAnchor: "start", dx: 6, dy: 5 * side, fill: "var(--wrong)" }),
          Plot.ruleX([threshold], { stroke: "var(--ink)" }),
        ],
      };
    },
    learning: (width) => {
      const { measured, ahead: forecast } = data.learning;
      const last = measured[measured.length - 1];
      return {
        width, height: 280, marginLeft: 50, marginBottom: 40, inset: 8,
        x: { type: "log", label: "training images", ticks: measured.map((point) => point.size).concat(forecast.size), tickFormat: "~s" },
        y: { label: "error", tickFormat: isRegression ? undefined : "%", grid: true, zero: true },
        marks: [
          Plot.ruleX(measured, { x: "size", y1: "low", y2: "high", stroke: "var(--right)", strokeWidth: 2 }),
          Plot.line(measured, { x: "size", y: "error", stroke: "var(--right)", strokeWidth: 2 }),
          Plot.dot(measured, { x: "size", y: "error", fill: "var(--right)", r: 4, tip: { fill: "var(--paper)" } }),
          Plot.line([last, forecast], { x: "size", y: "error", stroke: "var(--wrong)", strokeDasharray: "4 4" }),
          Plot.ruleX([forecast], { x: "size", y1: "low", y2: "high", stroke: "var(--wrong)", strokeWidth: 6, strokeOpacity: 0.4 }),
          Plot.dot([forecast], { x: "size", y: "error", stroke: "var(--wrong)", fill: "var(--paper)", r: 5, symbol: "diamond", tip: { fill: "var(--paper)" } }),
        ],
      };
    },
    sets: (width) => ({
      width, height: 260, marginLeft: 45, marginBottom: 40, inset: 4,
      x: { domain: [0.5, 1], label: "nominal coverage", tickFormat: "%" },
      y: { domain: [0.5, 1], label: "measured coverage", tickFormat: "%", grid: true },
      marks: [
        Plot.line([[0, 0], [1, 1]], { stroke: "var(--muted)", strokeDasharray: "4 4", clip: true }),
        Plot.ruleX(data.sets, { x: "level", y1: "low", y2: "high", stroke: "var(--right)", strokeWidth: 2, clip: true }),
        Plot.dot(data.sets, { x: "level", y: "coverage", fill: "var(--right)", r: 5, channels: { [isRegression ? "mean width" : "mean size"]: "size" }, tip: { fill: "var(--paper)" } }),
      ],
    }),
    novelty: (width) => ({
      width, height: 260, marginLeft: 45, marginBottom: 40, inset: 4,
      x: { domain: [0, 1], label: "novelty score: percentile among images like those of training", tickFormat: "%" },
      y: { label: "share of the images", tickFormat: "%", grid: true },
      marks: [
        Plot.rectY(data.novelty, { x1: "from", x2: "to", y: "share", fill: "var(--right)", insetRight: 1, tip: { fill: "var(--paper)" } }),
        Plot.ruleY([data.novelty.length ? 1 / data.novelty.length : 0], { stroke: "var(--muted)", strokeDasharray: "4 4" }),
      ],
    }),
  };
  const drawChart = (container) => {
    const width = Math.max(240, Math.floor(container.clientWidth));
    const options = charts[container.dataset.chart](width);
    const plot = Plot.plot({ ...options, className: "rendered", style: { background: "none", fontSize: "12px" } });
    for (const sheet of plot.querySelectorAll("style")) sheet.remove(); /* its rules are in the page's own style sheet */
    container.replaceChildren(plot);
  };
  const chartContainers = [...document.querySelectorAll("[data-chart]")].filter((container) => data[container.dataset.chart]);
  const drawCharts = () => chartContainers.forEach(drawChart);

  /* The threshold. */
  const slider = byId("threshold");
  const applyThreshold = () => {
    const threshold = Number(slider.value);
    byId("threshold-value").textContent = threshold.toFixed(2);
    const point = data.threshold.filter((point) => point.threshold <= threshold + 1e-9).pop() || data.threshold[0];
    const isEmpty = threshold > data.threshold[data.threshold.length - 1].threshold + 0.005;
    let text = `${percent(point.answered)} of the images are answered (${formatCount(point.rows)}), ${percent(point.right)} of them correctly, ${formatCount(point.wrong)} wrongly.`;
    if (isMultilabel) text = `${formatCount(point.rows)} labels are predicted: precision ${percent(point.right)}, recall ${percent(point.answered)}; ${formatCount(point.wrong)} are wrong.`;
    byId("threshold-outcome").textContent = isEmpty ? "No image is answered." : text;
    drawChart(document.querySelector("[data-chart=threshold]"));
  };
  if (slider && data.threshold) slider.addEventListener("input", applyThreshold);

  /* The images of a cell of the confusion matrix. */
  const dialog = byId("dialog");
  const MAX_DIALOG_IMAGES = 60;
  const createFigure = (i) => {
    const figure = createElement("figure", data.right[i] ? "" : "error");
    const frame = createElement("div", "frame");
    const source = imageSource(i);
    if (source) {
      const image = createElement("img");
      image.alt = "";
      image.src = source;
      frame.append(image);
    } else frame.append(createElement("span", "no-image", "no image"));
    const caption = createElement("figcaption");
    const prediction = createElement("span", "prediction");
    prediction.append(createName(toName(data.predicted[i])), createElement("span", "probability", data.sure[i] === null ? "" : percent(data.sure[i])));
    const id = createElement("span", "id");
    id.append(createName(data.ids[i]));
    caption.append(prediction, id);
    figure.append(frame, caption);
    return figure;
  };
  const openDialog = (cell, total) => {
    const [label, predicted] = cell.dataset.cell.split(",").map(Number);
    const indices = d3.range(data.ids.length).filter((i) => data.true[i] === label && data.predicted[i] === predicted);
    indices.sort((a, b) => (imageSource(b) !== null) - (imageSource(a) !== null) || data.sure[b] - data.sure[a]);
    const title = byId("dialog-title");
    const outcome = label === predicted ? [" predicted correctly"] : [" predicted as ", createName(toName(predicted))];
    title.replaceChildren(createName(toName(label)), ...outcome);
    const shown = Math.min(indices.length, MAX_DIALOG_IMAGES);
    const withImage = indices.filter((i) => imageSource(i) !== null).length;
    byId("dialog-about").textContent = `${shown < total ? `${formatCount(shown)} of ` : ""}${formatCount(total)} image${total === 1 ? "" : "s"}, most confident first${withImage < shown ? `; ${formatCount(withImage)} with a thumbnail` : ""}.`;
    byId("dialog-gallery").replaceChildren(...indices.slice(0, MAX_DIALOG_IMAGES).map(createFigure));
    dialog.showModal();
    byId("dialog-close").focus();
  };
  if (dialog) {
    byId("dialog-close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    for (const cell of document.querySelectorAll("[data-cell]")) {
      const total = Number(cell.firstChild.textContent.replaceAll(",", ""));
      if (cell.tagName !== "BUTTON") cell.setAttribute("role", "button");
      cell.addEventListener("click", () => openDialog(cell, total));
      cell.addEventListener("keydown", (event) => {
        if (cell.tagName !== "BUTTON" && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); openDialog(cell, total); }
      });
    }
  }

  /* The map: a canvas, because SVG is slow with ten thousand points and has no navigation by arrow keys. */
  const canvas = byId("map-canvas");
  const card = byId("map-card");
  const palette = d3.schemeObservable10 || d3.schemeTableau10;
  const colourSelect = byId("map-colour");
  const classSelect = byId("map-class");
  const state = { selected: -1, positions: [], visible: [] };
  const createOption = (value, text) => { const option = createElement("option", "", text); option.value = value; return option; };
  const fillSelects = () => {
    const hasClassColours = isClassification && data.classes.length <= palette.length;
    if (!isRegression) colourSelect.append(createOption("right", "correct and wrong"));
    if (hasClassColours) colourSelect.append(createOption("class", "true class"));
    if (isRegression) colourSelect.append(createOption("plain", "single colour"));
    if (data.sure.some((value) => value !== null)) colourSelect.append(createOption("sure", "confidence"));
    if (data.new) colourSelect.append(createOption("new", "novelty"));
    if (hasClassColours) colourSelect.value = "class";
    classSelect.append(createOption("", "all images"));
    if (!isRegression) classSelect.append(createOption("wrong", "errors"));
    if (isClassification && data.classes.length > 1) data.classes.forEach((name, i) => classSelect.append(createOption(String(i), (name || "(no name)").slice(0, 60))));
  };
  const isVisible = (i) => classSelect.value === "" || (classSelect.value === "wrong" ? !data.right[i] : data.true[i] === Number(classSelect.value));
  const pointColour = (i) => {
    if (colourSelect.value === "class") return palette[data.true[i]];
    if (colourSelect.value === "sure") return d3.interpolateLab(cssVariable("--wrong"), cssVariable("--right"))(data.sure[i]);
    if (colourSelect.value === "new") return d3.interpolateLab(cssVariable("--right"), cssVariable("--wrong"))(data.new[i] ** 3);
    return data.right[i] ? cssVariable("--right") : cssVariable("--wrong");
  };
  const drawMap = () => {
    const width = canvas.parentElement.clientWidth;
    const height = Math.min(560, Math.max(300, Math.round(width * 0.62)));
    const scale = window.devicePixelRatio || 1;
    canvas.width = width * scale;
    canvas.height = height * scale;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const x = d3.scaleLinear([-1.1, 1.1], [10, width - 10]);
    const y = d3.scaleLinear([-1.1, 1.1], [height - 10, 10]);
    state.positions = data.x.map((value, i) => [x(value), y(data.y[i])]);
    const indices = d3.range(data.ids.length);
    state.visible = indices.filter(isVisible);
    const radius = data.ids.length > 3000 ? 2 : data.ids.length > 600 ? 3 : 4;
    const tracePoint = (i, radius) => { context.beginPath(); context.arc(state.positions[i][0], state.positions[i][1], radius, 0, 7); };
    context.globalAlpha = 0.12;
    context.fillStyle = cssVariable("--muted");
    for (const i of indices) if (!isVisible(i)) { tracePoint(i, radius); context.fill(); }
    const ringsErrors = colourSelect.value === "class";
    const order = [...state.visible].sort((a, b) => data.right[b] - data.right[a]); /* errors on top */
    for (const i of order) {
      context.globalAlpha = data.right[i] || isRegression ? 0.55 : 0.95;
      context.fillStyle = pointColour(i);
      tracePoint(i, radius);
      context.fill();
      if (ringsErrors && !data.right[i]) { context.strokeStyle = cssVariable("--ink"); context.lineWidth = 1.5; tracePoint(i, radius + 1); context.stroke(); }
    }
    if (state.selected >= 0) {
      context.globalAlpha = 1;
      context.strokeStyle = cssVariable("--ink");
      context.lineWidth = 2.5;
      tracePoint(state.selected, radius + 5);
      context.stroke();
    }
    drawLegend();
  };
  const drawLegend = () => {
    const createEntry = (colour, text) => {
      const entry = createElement("span", "legend-entry");
      const swatch = createElement("i", "swatch");
      swatch.style.backgroundColor = colour;
      entry.append(swatch, createName(text));
      return entry;
    };
    const [right, wrong] = [cssVariable("--right"), cssVariable("--wrong")];
    const entries = {
      class: () => [...data.classes.map((name, i) => createEntry(palette[i], toName(i))), createElement("span", "legend-entry", "with a ring: wrong")],
      sure: () => [createEntry(right, "confident"), createEntry(wrong, "not confident")],
      new: () => [createEntry(right, "like training images"), createEntry(wrong, "novel")],
      right: () => [createEntry(right, "correct"), createEntry(wrong, "wrong")],
      plain: () => [],
    };
    byId("map-legend").replaceChildren(...entries[colourSelect.value]());
  };
  const selectPoint = (i) => {
    state.selected = i;
    card.hidden = i < 0;
    if (i >= 0) {
      const source = imageSource(i);
      const image = byId("map-image");
      image.hidden = source === null;
      if (source !== null) image.src = source;
      byId("map-caption").replaceChildren(createElement("b", "", describe(i)), createElement("br"), createName(data.ids[i]));
      const [px, py] = state.positions[i];
      const maxLeft = canvas.clientWidth - card.offsetWidth - 8;
      card.style.left = `${Math.max(0, Math.min(px + 14, maxLeft))}px`;
      card.style.top = `${Math.max(0, py + (py > canvas.clientHeight / 2 ? -card.offsetHeight - 14 : 14))}px`;
    }
    drawMap();
  };
  const findNearest = (px, py, maxDistance) => {
    let nearest = -1;
    let minDistance = maxDistance * maxDistance;
    for (const i of state.visible) {
      const [x, y] = state.positions[i];
      const distance = (x - px) ** 2 + (y - py) ** 2;
      if (distance < minDistance) { minDistance = distance; nearest = i; }
    }
    return nearest;
  };
  const findNext = (dx, dy) => {
    if (state.selected < 0) return findNearest(canvas.clientWidth / 2, canvas.clientHeight / 2, Infinity);
    const [px, py] = state.positions[state.selected];
    let next = state.selected;
    let minCost = Infinity;
    for (const i of state.visible) {
      if (i === state.selected) continue;
      const along = (state.positions[i][0] - px) * dx + (state.positions[i][1] - py) * dy;
      const across = Math.abs((state.positions[i][0] - px) * dy) + Math.abs((state.positions[i][1] - py) * dx);
      if (along > 0 && along + 2 * across < minCost && across <= along) { minCost = along + 2 * across; next = i; }
    }
    return next;
  };
  const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const addMapListeners = () => {
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const nearest = findNearest(event.clientX - box.left, event.clientY - box.top, 24);
      if (nearest !== state.selected) selectPoint(nearest);
    });
    canvas.addEventListener("pointerleave", () => selectPoint(-1));
    canvas.addEventListener("focus", () => { if (state.selected < 0 && canvas.matches(":focus-visible")) selectPoint(findNext(0, 0)); });
    canvas.addEventListener("blur", () => selectPoint(-1));
    canvas.addEventListener("keydown", (event) => {
      if (event.key === "Escape") selectPoint(-1);
      if (!(event.key in DIRECTIONS)) return;
      event.preventDefault();
      selectPoint(findNext(...DIRECTIONS[event.key]));
    });
    for (const select of [colourSelect, classSelect]) select.addEventListener("change", () => selectPoint(-1));
  };

  const drawAll = () => {
    drawCharts();
    if (slider && data.threshold) applyThreshold();
    if (canvas) drawMap();
  };
  document.documentElement.classList.add("scripted");
  if (canvas) { fillSelects(); addMapListeners(); }
  drawAll();
  let pendingFrame = 0;
  let drawnWidth = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === drawnWidth) return;
    drawnWidth = window.innerWidth;
    cancelAnimationFrame(pendingFrame);
    pendingFrame = requestAnimationFrame(drawAll);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  window.addEventListener("beforeprint", () => { if (canvas) selectPoint(-1); });
})();
