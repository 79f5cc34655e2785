"use strict";

// Tables: a column's button sorts by it, numbers from the largest, and again the other way round.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const numeric = head.classList.contains("number");
      const before = head.getAttribute("aria-sort");
      const first = numeric ? "descending" : "ascending";
      const other = numeric ? "ascending" : "descending";
      const order = before === first ? other : first;
      for (const each of heads) if (each.hasAttribute("aria-sort")) each.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].map((row) => [row.cells[column].dataset.v ?? row.cells[column].textContent, row]);
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");  // what is not known comes last
        return sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}

// The strip: pointing at a layer or moving to it with the arrow keys reads it out.
for (const strip of document.querySelectorAll(".strip")) {
  const columns = [...strip.querySelectorAll("a.column")];
  const readout = document.getElementById(strip.dataset.readout);
  const hint = readout.textContent;
  const show = (column) => { readout.textContent = column ? column.getAttribute("aria-label") : hint; };
  columns.forEach((column, place) => {
    column.tabIndex = place === 0 ? 0 : -1;  // one stop for the tab key, arrows inside
    column.addEventListener("pointerenter", () => show(column));
    column.addEventListener("focus", () => show(column));
    column.addEventListener("keydown", (event) => {
      const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: columns.length - 1 }[event.key];
      if (to === undefined || !columns[to]) return;
      event.preventDefault();
      column.tabIndex = -1;
      columns[to].tabIndex = 0;
      columns[to].focus();
    });
  });
  strip.addEventListener("pointerleave", () => show(columns.includes(document.activeElement) ? document.activeElement : null));
}
