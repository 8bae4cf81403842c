"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const tip = document.getElementById("tip");

  // ---- what is said of the mark below the pointer ----

  const say = (text, x, y) => {
    if (tip.textContent !== text) tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(x + 14, document.documentElement.clientWidth - box.width - 8);
    const below = y + 18 + box.height < window.innerHeight;
    tip.style.left = `${Math.max(left, 8)}px`;
    tip.style.top = `${below ? y + 18 : y - box.height - 10}px`;
  };
  const quiet = () => { tip.hidden = true; };
  document.addEventListener("pointermove", (event) => {
    const mark = event.target.closest("[data-tip]");
    if (mark) say(mark.dataset.tip, event.clientX, event.clientY);
    else if (!event.target.closest("[data-points]")) quiet();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") quiet(); });
  document.addEventListener("scroll", quiet, { passive: true });

  // ---- points of a chart, by pointer and by arrow keys ----

  for (const chart of all("svg[data-points]")) {
    const points = chart.dataset.points.split("\n").map((line) => {
      const [x, y, ...words] = line.split(" ");
      return [Number(x), Number(y), words.join(" ")];
    });
    const cross = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    cross.setAttribute("class", "cross");
    cross.setAttribute("r", "5");
    let current = -1;
    const show = (index) => {
      current = index;
      const [x, y, text] = points[index];
      cross.setAttribute("cx", x);
      cross.setAttribute("cy", y);
      chart.append(cross);
      const place = cross.getBoundingClientRect();
      say(text, place.right, place.bottom - 12);
    };
    const hide = () => { cross.remove(); current = -1; quiet(); };
    chart.addEventListener("pointermove", (event) => {
      if (event.target.closest("[data-tip]")) { cross.remove(); return; }
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
      let nearest = 0;
      points.forEach(([x, y], index) => {
        const far = ([a, b]) => Math.abs(a - at.x) + 0.05 * Math.abs(b - at.y);
        if (far([x, y]) < far(points[nearest])) nearest = index;
      });
      show(nearest);
    });
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("blur", hide);
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, Home: -points.length, End: points.length }[event.key];
      if (!step) return;
      event.preventDefault();
      show(Math.min(Math.max(current + step, 0), points.length - 1));
    });
  }

  // ---- tables that sort ----

  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };
  const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
    : typeof a === typeof b ? a.localeCompare(b, undefined, { numeric: true }) : typeof a === "number" ? -1 : 1;
  for (const title of all("table.sorts th[aria-sort] button")) {
    const head = title.parentElement;
    title.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      const body = head.closest("table").tBodies[0];
      const rows = [...body.rows].sort((a, b) => order(value(a, head.cellIndex), value(b, head.cellIndex)));
      body.append(...(down ? rows.reverse() : rows));
      for (const other of all("th[aria-sort]", head.parentElement)) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
    });
  }

  // ---- layers: filter, and choose one ----

  const filter = document.getElementById("layer-filter");
  const count = document.getElementById("layer-count");
  if (filter) filter.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase();
    let shown = 0;
    for (const row of document.getElementById("layers").tBodies[0].rows) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = wanted ? `${shown} of ${count.dataset.total} tensors` : `${count.dataset.total} tensors`;
  });
  const choices = all("button[data-shows]");
  const choose = (id) => {
    for (const choice of choices) choice.setAttribute("aria-pressed", String(choice.dataset.shows === id));
    for (const figure of all("figure.layer")) figure.hidden = figure.id !== id;
  };
  for (const choice of choices) choice.addEventListener("click", () => choose(choice.dataset.shows));
  for (const tile of all(".tile[data-layer]")) {
    const id = `layer-${tile.dataset.layer}`;
    if (document.getElementById(id)) tile.addEventListener("click", () => {
      choose(id);
      document.getElementById("layer-panel").scrollIntoView({ block: "nearest" });
    });
  }

  // ---- commands ----

  for (const button of all("button.copy")) button.addEventListener("click", async () => {
    const command = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(command); // where a page may not write to the clipboard
    }
  });
})();
