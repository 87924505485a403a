"use strict";
// What the page can do beyond being read; without it everything is there, one below the other.

(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null; // kept nowhere: a page opened from a file may have no storage

  const show = () => {
    const isDark = chosen ?? system.matches;
    root.style.colorScheme = chosen === null ? "" : isDark ? "dark" : "light";
    button.textContent = isDark ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark ? "light" : "dark"} colours`);
  };
  button.addEventListener("click", () => {
    chosen = !(chosen ?? system.matches);
    show();
  });
  system.addEventListener("change", show);
  button.hidden = false;
  show();
})();

// Views: buttons that show one at a time.
for (const group of document.querySelectorAll(".views")) {
  const views = [...group.querySelectorAll(":scope > .view")];
  if (views.length < 2) continue;
  const choices = document.createElement("div");
  choices.className = "choices";
  const buttons = views.map((view) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = view.getAttribute("aria-label");
    button.addEventListener("click", () => show(view));
    choices.append(button);
    return button;
  });
  const show = (chosen) =>
    views.forEach((view, idx) => {
      view.hidden = view !== chosen;
      buttons[idx].setAttribute("aria-pressed", String(view === chosen));
    });
  group.prepend(choices);
  group.classList.add("one-at-a-time");
  show(views[0]);
}

// Tables: every heading is a button that sorts by its column, upwards at first, the other way at the next press.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];

  const sort = (columnIdx, isAscending) => {
    const sign = isAscending ? 1 : -1;
    const hasFigures = headings[columnIdx].className === "";
    const keyed = [...body.rows].map((row) => {
      const cell = row.cells[columnIdx];
      return { row, key: hasFigures ? Number(cell.dataset.value ?? NaN) : cell.textContent };
    });
    const isMissing = ({ key }) => key === "" || Number.isNaN(key);
    keyed.sort((a, b) => {
      if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b);
      return sign * (hasFigures ? a.key - b.key : a.key.localeCompare(b.key, "en", { numeric: true }));
    });
    body.append(...keyed.map(({ row }) => row));
  };

  headings.forEach((heading, columnIdx) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const isAscending = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of headings) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", isAscending ? "ascending" : "descending");
      sort(columnIdx, isAscending);
    });
  });
}
