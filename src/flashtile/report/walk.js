// Shows the steps that walk.py computed. Nothing is computed here but places and colours.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("walk-data").textContent);
  const root = document.getElementById("walk");
  const find = (selector) => root.querySelector(selector);
  const reducesMotion = matchMedia("(prefers-reduced-motion: reduce)");
  const SECONDS_PER_STEP = 1.6;
  let maskName = "full";
  let position = 0; // steps done: 0 is before the first tile
  let timer = null;

  const walk = () => data.walks[maskName];
  const number = (value, digits) => (value === null ? "−∞" : value.toFixed(digits).replace("-", "−"));
  const small = (value) => (value === 0 ? "0" : value >= 0.001 ? value.toFixed(3) : value.toExponential(0).replace("-", "−"));
  const list = (numbers) => numbers.join(", ").replace(/, (\d+)$/, " and $1");

  function element(tag, text = "", className = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    made.className = className;
    return made;
  }

  function header(text, scope) {
    const made = element("th", text);
    made.scope = scope;
    return made;
  }

  // --- the matrix -----------------------------------------------------------------------------------------------

  const cells = [];
  const outs = [];

  function buildGrid() {
    const grid = find(".walk-grid");
    const head = grid.createTHead().insertRow();
    head.append(header("q\\k", "col"));
    for (let key = 0; key < data.seqlen; key++) {
      head.append(header(key, "col"));
      head.lastChild.classList.toggle("tile-left", key % data.block_kv === 0 && key > 0);
    }
    head.append(header("out", "col"));
    const body = grid.createTBody();
    for (let query = 0; query < data.seqlen; query++) {
      const row = body.insertRow();
      row.append(header(query, "row"));
      cells.push([]);
      for (let key = 0; key < data.seqlen; key++) cells[query].push(row.insertCell());
      outs.push(row.insertCell());
    }
  }

  function stateOfTile(qTile, kvTile) {
    if (walk().kinds[qTile][kvTile] === "empty") return "skipped";
    const place = walk().steps.findIndex((step) => step.q_tile === qTile && step.kv_tile === kvTile);
    return place < position - 1 ? "used" : place === position - 1 ? "now" : "later";
  }

  // How much of the accent colour: little enough for text to stay readable on it.
  const mix = (share) => `${8 + 40 * share}%`;
  const heat = (score) => mix(score === null ? 0 : Math.min(Math.max((score + 2) / 4, 0), 1));

  function showScore(cell, score) {
    cell.textContent = number(score, 1);
    cell.classList.toggle("pair-hidden", score === null);
    cell.style.setProperty("--heat", heat(score));
  }

  function showGrid(step) {
    for (let query = 0; query < data.seqlen; query++) {
      const qTile = Math.floor(query / data.block_q);
      const row = cells[query][0].parentElement;
      row.className = query % data.block_q === 0 && query > 0 ? "tile-top" : "";
      row.classList.toggle("row-now", step !== null && step.q_tile === qTile);
      for (let key = 0; key < data.seqlen; key++) {
        const kvTile = Math.floor(key / data.block_kv);
        const state = stateOfTile(qTile, kvTile);
        const cell = cells[query][key];
        cell.className = `tile-${state}`;
        cell.classList.toggle("tile-left", key % data.block_kv === 0 && key > 0);
        cell.textContent = "";
        if (state === "now") showScore(cell, step.s[query % data.block_q][key % data.block_kv]);
      }
      const isFinal = lastStepOf(qTile) < position;
      outs[query].className = "row-out";
      outs[query].textContent = isFinal ? "✓" : "";
    }
  }

  const lastStepOf = (qTile) => walk().steps.map((step) => step.q_tile).lastIndexOf(qTile);

  // --- fast memory ----------------------------------------------------------------------------------------------

  const LINES = [
    ["old maximum", "old_max", 2],
    ["tile maximum", "tile_max", 2],
    ["new maximum", "new_max", 2],
    ["rescale", "rescale", 4],
    ["row_sum", "row_sum", 4],
  ];

  function showTile(name, step, digits) {
    const table = find(`[data-show=${name}]`);
    table.replaceChildren();
    for (let row = 0; row < data.block_q; row++) {
      const line = table.insertRow();
      for (let col = 0; col < data.block_kv; col++) {
        const cell = line.insertCell();
        cell.className = step === null ? "tile-later" : "tile-now";
        if (step === null) continue;
        const value = step[name][row][col];
        cell.textContent = number(value, digits);
        cell.style.setProperty("--heat", name === "p" ? mix(value) : heat(value));
      }
    }
  }

  function showRows(step) {
    const table = find(".walk-rows");
    const firstQuery = step === null ? 0 : step.q_tile * data.block_q;
    table.tHead?.remove();
    for (const body of [...table.tBodies]) body.remove();
    const head = table.createTHead().insertRow();
    head.append(header("query", "col"));
    for (let row = 0; row < data.block_q; row++) head.append(header(firstQuery + row, "col"));
    const body = table.createTBody();
    for (const [title, name, digits] of LINES) {
      const line = addLine(body, title, "");
      for (let row = 0; row < data.block_q; row++) {
        const cell = line.insertCell();
        cell.textContent = step === null ? "" : number(step[name][row], digits);
        const isNew = step !== null && name === "new_max" && step.new_max[row] !== step.old_max[row];
        cell.classList.toggle("changed", isNew);
      }
    }
    for (let dim = 0; dim < data.head_dim; dim++) showOutputs(addLine(body, `out[${dim}]`, "outs"), dim, step, firstQuery);
    showErrors(addLine(body, "error", "error"), step);
  }

  function addLine(body, title, className) {
    const line = body.insertRow();
    line.className = className;
    line.append(header(title, "row"));
    return line;
  }

  function showOutputs(line, dim, step, firstQuery) {
    for (let row = 0; row < data.block_q; row++) {
      const exact = number(walk().exact[firstQuery + row][dim], 4);
      const cell = line.insertCell();
      cell.append(element("span", step === null ? "0" : number(step.out[row][dim], 4), "out"));
      cell.append(element("small", exact, "exact"));
      cell.lastChild.title = "exact";
    }
    line.cells[0].append(element("small", "exact"));
  }

  function showErrors(line, step) {
    for (let row = 0; row < data.block_q; row++) {
      const cell = line.insertCell();
      if (step === null) continue;
      const error = step.error[row];
      cell.append(element("span", small(error), error < data.rounding ? "is-exact" : ""));
      cell.append(meter(Math.max(0, 1 + Math.log10(Math.max(error, 1e-9)) / 7)));
    }
  }

  function meter(share) {
    const made = element("span", "", "meter");
    made.append(element("i"));
    made.firstChild.style.width = `${Math.min(share, 1) * 100}%`;
    return made;
  }

  // --- words and counters ---------------------------------------------------------------------------------------

  function caption(step) {
    const count = walk().steps.length;
    if (step === null) return ["Before the first tile.", "Every maximum is −∞, every sum and output 0. Press Step."];
    const firstQuery = step.q_tile * data.block_q;
    const firstKey = step.kv_tile * data.block_kv;
    const title =
      `Tile ${position} of ${count}: queries ${firstQuery}–${firstQuery + data.block_q - 1}, ` +
      `keys ${firstKey}–${firstKey + data.block_kv - 1}.`;
    const words = [];
    const isFirst = step.old_max.every((value) => value === null);
    const raised = step.old_max.flatMap((old, row) => (old !== step.new_max[row] ? [firstQuery + row] : []));
    if (isFirst) words.push("The first keys that these queries see: their largest score is the maximum.");
    else if (raised.length > 0) {
      const row = raised[0] - firstQuery;
      const noun = raised.length > 1 ? `Queries ${list(raised)} meet` : `Query ${raised[0]} meets`;
      words.push(
        `${noun} a score above the maximum so far. What query ${raised[0]} has summed up is multiplied by ` +
          `exp(${number(step.old_max[row], 2)} − ${signed(step.new_max[row])}) = ${number(step.rescale[row], 4)}.`,
      );
    } else words.push("No score above a maximum: nothing is rescaled, the sums just grow.");
    if (step.kind === "partial") words.push("The diagonal crosses this tile: later keys are hidden (−∞).");
    if (lastStepOf(step.q_tile) === position - 1) {
      const skipped = walk().kinds[step.q_tile].filter((kind) => kind === "empty").length;
      words.push(`These rows are complete: what error is left is float32 rounding.${skipped > 0 ? ` ${skipped} empty tile${skipped > 1 ? "s are" : " is"} skipped.` : ""}`);
    }
    return [title, words.join(" ")];
  }

  const signed = (value) => (value < 0 ? `(${number(value, 2)})` : number(value, 2));

  function showCounter(name, value, total) {
    const shown = find(`[data-show=${name}]`);
    shown.textContent = value;
    shown.parentElement.querySelector(".meter i").style.width = `${(100 * value) / total}%`;
  }

  // --- control --------------------------------------------------------------------------------------------------

  function show() {
    const steps = walk().steps;
    const step = position === 0 ? null : steps[position - 1];
    root.dataset.position = position;
    showGrid(step);
    showTile("s", step, 2);
    showTile("p", step, 3);
    showRows(step);
    showCounter("naive", step === null ? 0 : step.scores_of_naive, data.numbers_of_naive);
    showCounter("kept", step === null ? 0 : walk().numbers_kept, data.numbers_of_naive);
    showCounter("computed", step === null ? 0 : step.scores_computed, data.numbers_of_naive);
    const [title, words] = caption(step);
    find(".walk-caption strong").textContent = title;
    find(".walk-caption span").textContent = words;
    const range = find(".walk-range");
    range.max = steps.length;
    range.value = position;
    range.setAttribute("aria-valuetext", title);
    for (const [name, isOff] of [["reset", position === 0], ["back", position === 0], ["next", position === steps.length]]) {
      find(`[data-do=${name}]`).setAttribute("aria-disabled", isOff);
    }
  }

  function go(target) {
    position = Math.min(Math.max(target, 0), walk().steps.length);
    if (position === walk().steps.length) stop();
    show();
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    showPlaying(false);
  }

  function play() {
    if (timer !== null) return stop();
    if (position === walk().steps.length) go(0);
    timer = setInterval(() => go(position + 1), SECONDS_PER_STEP * 1000);
    showPlaying(true);
    go(position + 1);
  }

  function showPlaying(isPlaying) {
    const button = find("[data-do=play]");
    button.classList.toggle("playing", isPlaying);
    button.lastElementChild.textContent = isPlaying ? "Pause" : "Play";
    find(".walk-caption").setAttribute("aria-live", isPlaying ? "off" : "polite"); // it would never stop talking
  }

  const actions = {
    reset: () => (stop(), go(0)),
    back: () => (stop(), go(position - 1)),
    next: () => (stop(), go(position + 1)),
    play,
  };
  const keys = { ArrowLeft: "back", ArrowRight: "next", Home: "reset" };

  root.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-do]");
    if (button) actions[button.dataset.do]();
  });
  root.addEventListener("keydown", (event) => {
    if (event.target.matches("[type=range]") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in keys) actions[keys[event.key]]();
    else if (event.key === "End") (stop(), go(walk().steps.length));
    else return;
    event.preventDefault();
  });
  find(".walk-range").addEventListener("input", (event) => (stop(), go(Number(event.target.value))));
  find("[type=checkbox]").addEventListener("change", (event) => {
    stop();
    maskName = event.target.checked ? "causal" : "full";
    go(0);
  });

  buildGrid();
  stop();
  show();
})();
