"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const make = (name, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };
  root.classList.add("js");

  // Theme: as the system has it, or chosen and remembered where the browser allows.
  const THEMES = ["system", "light", "dark"];
  const themeButton = document.getElementById("theme");
  const setTheme = (theme) => {
    if (theme === "system") delete root.dataset.theme;
    else root.dataset.theme = theme;
    themeButton.textContent = `Theme: ${theme}`;
  };
  let theme = "system";
  try { theme = localStorage.getItem("theme") || theme; } catch { /* storage is off */ }
  setTheme(THEMES.includes(theme) ? theme : "system");
  themeButton.hidden = false;
  themeButton.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(root.dataset.theme || "system") + 1) % THEMES.length];
    setTheme(next);
    try { localStorage.setItem("theme", next); } catch { /* storage is off */ }
  });

  const form = document.getElementById("filters");
  if (!form) return;
  const sections = all("section.ranking");
  const rowsOf = (section) => all(":scope > .scroll > table > tbody > tr.entry", section);
  const detailOf = (row) => document.getElementById(`${row.id}-detail`);
  const buttonOf = (row) => row.querySelector("th button");
  const total = all("tr.entry").length;

  // Sorting: missing values come last in either direction.
  const sortBy = (table, header) => {
    const headers = [...header.parentElement.children];
    const at = headers.indexOf(header);
    const opposite = { ascending: "descending", descending: "ascending" };
    const direction = opposite[header.getAttribute("aria-sort")] || header.dataset.first;
    const sign = direction === "ascending" ? 1 : -1;
    const number = header.dataset.kind === "number";
    const keyed = all(":scope > tbody > tr.entry", table).map((row) => {
      const value = row.children[at].dataset.value;
      return { row, detail: detailOf(row), missing: value === "", key: number ? parseFloat(value) : value };
    });
    const compare = number ? (a, b) => a - b : (a, b) => a.localeCompare(b, "en", { numeric: true });
    keyed.sort((a, b) => a.missing - b.missing || (a.missing ? 0 : sign * compare(a.key, b.key)));
    table.tBodies[0].append(...keyed.flatMap(({ row, detail }) => [row, detail]));
    headers.forEach((one) => one.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", direction);
  };
  for (const table of all("section.ranking > .scroll > table")) {
    for (const header of all(":scope > thead th", table)) {
      const button = make("button", { type: "button", textContent: header.textContent });
      button.addEventListener("click", () => sortBy(table, header));
      header.replaceChildren(button);
    }
  }

  // Details of a row.
  const setOpen = (row, open) => {
    buttonOf(row).setAttribute("aria-expanded", open);
    detailOf(row).hidden = row.hidden || !open;
  };
  const isOpen = (row) => buttonOf(row).getAttribute("aria-expanded") === "true";
  for (const row of all("tr.entry")) {
    const header = row.querySelector("th");
    const button = make("button", { type: "button", textContent: header.textContent });
    button.setAttribute("aria-controls", detailOf(row).id);
    header.replaceChildren(button);
    button.addEventListener("click", () => { setOpen(row, !isOpen(row)); nameExpandButton(); });
    setOpen(row, false);
  }
  const expandButton = document.getElementById("expand");
  const shownRows = () => all("section.ranking:not([hidden]) tr.entry:not([hidden])");
  const allOpen = () => { const rows = shownRows(); return rows.length > 0 && rows.every(isOpen); };
  const nameExpandButton = () => { expandButton.textContent = allOpen() ? "Collapse all" : "Expand all"; };
  expandButton.addEventListener("click", () => {
    const open = !allOpen();
    shownRows().forEach((row) => setOpen(row, open));
    nameExpandButton();
  });

  // Filters; the address keeps what is not the default.
  const fields = [...form.elements].filter((field) => field.name);
  const rules = form.elements.rule;
  const DEFAULTS = { rule: [...rules.options].some((one) => one.value === "training-domain") ? "training-domain" : "", cost: "macs" };
  const usual = (name) => DEFAULTS[name] || "";
  const readAddress = () => {
    const wanted = new URLSearchParams(location.hash.slice(1));
    for (const field of fields) {
      const value = wanted.get(field.name) ?? usual(field.name);
      field.value = value;
      if (field.value !== value) field.value = usual(field.name);
    }
  };
  const writeAddress = () => {
    const chosen = new URLSearchParams(fields.filter((field) => field.value !== usual(field.name)).map((field) => [field.name, field.value]));
    history.replaceState(null, "", chosen.size ? `#${chosen}` : location.pathname + location.search);
  };
  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  const apply = () => {
    const chosen = Object.fromEntries(fields.map((field) => [field.name, field.value]));
    const words = chosen.search.toLowerCase().split(/\s+/).filter(Boolean);
    const keeps = (element, names) => names.every((name) => !chosen[name] || element.dataset[name] === chosen[name]);
    let rows = 0;
    let tables = 0;
    for (const section of sections) {
      const fits = keeps(section, ["dataset", "rule", "track", "transductive"]);
      let shown = 0;
      for (const row of rowsOf(section)) {
        const text = row.dataset.search.toLowerCase();
        row.hidden = !(fits && keeps(row, ["family", "band", "tier"]) && words.every((word) => text.includes(word)));
        setOpen(row, isOpen(row));
        shown += !row.hidden;
      }
      section.hidden = shown === 0;
      rows += shown;
      tables += shown > 0;
    }
    document.getElementById("nothing").hidden = rows > 0;
    const narrowed = fields.filter((field) => field.name !== "cost" && field.value !== "")
      .map((field) => `${field.labels[0].firstChild.textContent.trim()}: ${field.value}`);
    document.getElementById("count").textContent = `${rows} of ${plural(total, "row")} shown, in ${plural(tables, "table")}.`
      + (narrowed.length ? ` ${narrowed.join("; ")}.` : "");
    nameExpandButton();
    drawAll();
  };
  let waiting = 0;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { writeAddress(); apply(); }, 120);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    fields.forEach((field) => { field.value = usual(field.name); });
    writeAddress();
    apply();
  });
  addEventListener("hashchange", () => {
    if (document.getElementById(location.hash.slice(1))) return; // a place on the page
    readAddress();
    apply();
  });

  // Plots: accuracy against cost, and the front of what no shown method beats in both.
  const COSTS = { macs: "MACs left", bitops: "BitOPs", parameters: "Parameters left" };
  const SHAPES = {
    pruning: ["\u25CB", "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z"],
    objective: ["\u25A1", "M-4.5 -4.5h9v9h-9z"],
    quantization: ["\u25B3", "M0 -5.5l5.5 10h-11z"],
  };
  const OTHER = ["\u25C7", "M0 -6l6 6l-6 6l-6 -6z"];
  const svg = (name, attributes = {}, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const magnitude = (value) => {
    for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
      if (value >= 0.9995 * size) return `${+(value / size).toPrecision(3)}${unit}`;
    }
    return String(+value.toPrecision(3));
  };
  const beats = (one, two) => one.cost <= two.cost && one.accuracy >= two.accuracy && (one.cost < two.cost || one.accuracy > two.accuracy);
  const steps = (low, high, count) => {
    const raw = (high - low) / count;
    const base = 10 ** Math.floor(Math.log10(raw));
    const step = base * [1, 2, 5, 10].find((factor) => factor * base >= raw);
    const found = [];
    for (let at = Math.ceil(low / step); at * step <= high + step * 1e-6; at += 1) found.push(+(at * step).toPrecision(12));
    return found;
  };
  const logTicks = (low, high, most) => {
    for (const factors of [[1, 2, 5], [1, 3], [1]]) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
        for (const factor of factors) {
          const tick = factor * 10 ** power;
          if (tick >= low && tick <= high) found.push(tick);
        }
      }
      if (found.length <= most) return found.length > 1 ? found : steps(low, high, most);
    }
    return [low, high];
  };
  const pointsOf = (section, cost) => {
    const points = rowsOf(section)
      .filter((row) => !row.hidden && row.dataset.accuracy !== "" && parseFloat(row.dataset[cost]) > 0)
      .map((row) => ({
        row,
        name: row.dataset.name,
        family: row.dataset.family,
        accuracy: parseFloat(row.dataset.accuracy),
        error: row.dataset.error === "" ? null : parseFloat(row.dataset.error),
        cost: parseFloat(row.dataset[cost]),
        mark: row.dataset.unverified.split(" ").includes(cost) ? " \u2021" : "",
      }));
    for (const point of points) point.best = !points.some((other) => beats(other, point));
    return points.sort((a, b) => a.cost - b.cost || b.accuracy - a.accuracy);
  };
  const told = (point) => `${point.accuracy.toFixed(1)} \u00B1 ${point.error === null ? "\u2013" : point.error.toFixed(1)} %`;
  const go = (row) => {
    setOpen(row, true);
    nameExpandButton();
    all("tr.target").forEach((one) => one.classList.remove("target"));
    row.classList.add("target");
    row.scrollIntoView({ block: "center" });
    buttonOf(row).focus({ preventScroll: true });
  };
  const draw = (section) => {
    const figure = section.querySelector("figure");
    const cost = form.elements.cost.value;
    const points = pointsOf(section, cost);
    const shown = rowsOf(section).filter((row) => !row.hidden).length;
    figure.hidden = points.length < 2;
    if (figure.hidden) return figure.replaceChildren();
    const width = Math.max(280, figure.clientWidth);
    const height = Math.round(Math.min(380, Math.max(260, width * 0.45)));
    const edge = { left: 52, right: 16, top: 14, bottom: 46 };
    const costs = points.map((point) => point.cost);
    const spread = Math.max(1.25, (Math.max(...costs) / Math.min(...costs)) ** 0.06);
    const [low, high] = [Math.min(...costs) / spread, Math.max(...costs) * spread];
    const ends = points.flatMap((point) => [point.accuracy - (point.error || 0), point.accuracy + (point.error || 0)]);
    const pad = Math.max(0.5, 0.08 * (Math.max(...ends) - Math.min(...ends)));
    const [bottom, top] = [Math.max(0, Math.min(...ends) - pad), Math.min(100.5, Math.max(...ends) + pad)];
    const x = (value) => edge.left + (Math.log(value / low) / Math.log(high / low)) * (width - edge.left - edge.right);
    const y = (value) => height - edge.bottom - ((value - bottom) / (top - bottom)) * (height - edge.top - edge.bottom);
    const title = section.querySelector("h2").textContent;
    const picture = svg("svg", {
      viewBox: `0 0 ${width} ${height}`,
      role: "group",
      "aria-label": `${title}: average accuracy against ${COSTS[cost]}, ${plural(points.length, "method")}. Arrow keys move between them, Enter opens a row. The table below the plot has its numbers.`,
    });
    for (const tick of steps(bottom, top, 5)) {
      picture.append(svg("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: y(tick), y2: y(tick) }));
      picture.append(svg("text", { class: "tick", x: edge.left - 8, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
    }
    for (const tick of logTicks(low, high, width / 70)) {
      picture.append(svg("line", { class: "axis", x1: x(tick), x2: x(tick), y1: height - edge.bottom, y2: height - edge.bottom + 5 }));
      picture.append(svg("text", { class: "tick", x: x(tick), y: height - edge.bottom + 19, "text-anchor": "middle" }, magnitude(tick)));
    }
    picture.append(svg("line", { class: "axis", x1: edge.left, x2: width - edge.right, y1: height - edge.bottom, y2: height - edge.bottom }));
    picture.append(svg("text", { x: (edge.left + width - edge.right) / 2, y: height - 8, "text-anchor": "middle" }, `${COSTS[cost]} (logarithmic)`));
    picture.append(svg("text", { transform: `translate(13 ${(edge.top + height - edge.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "Average accuracy (%)"));

    const front = points.filter((point) => point.best);
    const path = front.map((point, at) => (at ? `H${x(point.cost)}V${y(point.accuracy)}` : `M${x(point.cost)} ${y(point.accuracy)}`)).join("");
    picture.append(svg("path", { class: "front", d: `${path}H${width - edge.right}` }));

    const tip = make("div", { className: "tip", hidden: true });
    tip.setAttribute("aria-hidden", "true"); // the point's own label says the same
    let leaving = 0;
    const hide = () => { tip.hidden = true; };
    const show = (point) => {
      clearTimeout(leaving);
      tip.textContent = `${point.name}\n${told(point)}, ${magnitude(point.cost)}${point.mark} ${COSTS[cost]}${point.best ? "\non the front" : ""}`;
      tip.hidden = false;
      const scale = picture.getBoundingClientRect().width / width;
      const [across, down] = [x(point.cost) * scale, y(point.accuracy) * scale];
      tip.style.left = `${Math.max(0, Math.min(across + 14, figure.clientWidth - tip.offsetWidth))}px`;
      tip.style.top = `${down - tip.offsetHeight - 14 >= 0 ? down - tip.offsetHeight - 14 : down + 16}px`;
    };
    const leave = () => { leaving = setTimeout(hide, 200); };
    tip.addEventListener("pointerenter", () => clearTimeout(leaving));
    tip.addEventListener("pointerleave", leave);
    const marks = points.map((point, at) => {
      const mark = svg(
        "g",
        {
          class: point.best ? "point best-point" : "point",
          transform: `translate(${x(point.cost)} ${y(point.accuracy)})`,
          role: "button",
          tabindex: at ? -1 : 0,
          "aria-label": `${point.name}: ${told(point)} at ${magnitude(point.cost)}${point.mark} ${COSTS[cost]}${point.best ? ", on the front" : ""}`,
        },
        svg("circle", { class: "target-area", r: 11 }),
      );
      if (point.error) {
        const reach = Math.abs(y(point.accuracy) - y(point.accuracy + point.error));
        mark.append(svg("line", { class: "error", y1: -reach, y2: reach }));
      }
      mark.append(svg("path", { class: "mark", d: (SHAPES[point.family] || OTHER)[1] }));
      mark.addEventListener("pointerenter", () => show(point));
      mark.addEventListener("pointerleave", leave);
      mark.addEventListener("focus", () => show(point));
      mark.addEventListener("blur", leave);
      mark.addEventListener("click", () => go(point.row));
      return mark;
    });
    picture.append(...marks);
    picture.addEventListener("keydown", (event) => {
      const at = marks.indexOf(document.activeElement);
      const last = marks.length - 1;
      const next = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, Home: 0, End: last }[event.key];
      if (next !== undefined) {
        const mark = marks[Math.max(0, Math.min(last, next))];
        marks.forEach((one) => one.setAttribute("tabindex", one === mark ? 0 : -1));
        mark.focus();
      } else if (event.key === "Enter" || event.key === " ") go(points[at].row);
      else if (event.key === "Escape") hide();
      else return;
      event.preventDefault();
    });

    // Names of the front, and of others, where there is room.
    const taken = points.map((point) => [x(point.cost) - 7, y(point.accuracy) - 7, x(point.cost) + 7, y(point.accuracy) + 7]);
    const clear = (box) => box[0] >= edge.left && box[2] <= width - 2 && box[1] >= 0 && box[3] <= height - edge.bottom - 2
      && !taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3]);
    for (const [at, point] of front.entries()) {
      const next = front[at + 1];
      const end = next ? x(next.cost) : width - edge.right;
      taken.push([x(point.cost), y(point.accuracy) - 1, end, y(point.accuracy) + 1]);
      if (next) taken.push([end - 1, y(next.accuracy), end + 1, y(point.accuracy)]);
    }
    const pen = make("canvas").getContext("2d");
    pen.font = "12px system-ui, sans-serif";
    for (const point of [...front, ...points.filter((one) => !one.best)]) {
      const name = point.name.length > 34 ? `${point.name.slice(0, 33)}\u2026` : point.name;
      const wide = pen.measureText(name).width;
      const [across, down] = [x(point.cost), y(point.accuracy)];
      const places = [[across + 10, down + 4], [across - 10 - wide, down + 4], [across - wide / 2, down - 12], [across - wide / 2, down + 20],
        [across + 8, down - 10], [across - 8 - wide, down - 10], [across + 8, down + 18], [across - 8 - wide, down + 18]];
      for (const [left, base] of places) {
        const box = [left, base - 11, left + wide, base + 3];
        if (!clear(box)) continue;
        taken.push(box);
        const anchor = left < across - wide * 0.75 ? "end" : left < across ? "middle" : "start";
        const at = { end: left + wide, middle: left + wide / 2, start: left }[anchor];
        picture.append(svg("text", { x: at, y: base, "text-anchor": anchor, class: "label", "aria-hidden": "true" }, name));
        break;
      }
    }

    const families = [...new Set(points.map((point) => point.family))].sort();
    const key = families.map((family) => `${(SHAPES[family] || OTHER)[0]} ${family}`).join(", ");
    const without = shown - points.length;
    const words = `Filled and joined: the front, where no other shown method is as accurate and as cheap, and better in one. ${key}. Bars: standard error.`
      + (cost === "bitops" ? " Networks that are not quantized count 32 \u00D7 32 BitOPs a MAC." : "")
      + (points.some((point) => point.mark) ? " \u2021 not recomputed: what the runs say of themselves." : "")
      + (without ? ` ${plural(without, "row")} without average or cost left out.` : "");
    const headers = ["Method", COSTS[cost], "Average accuracy (%)", "On the front"];
    const cells = (values) => [
      make("th", { scope: "row", textContent: values[0] }),
      ...values.slice(1).map((value) => make("td", { textContent: value })),
    ];
    const table = make(
      "table", {},
      make("caption", { textContent: `${title}: average accuracy against ${COSTS[cost]}` }),
      make("thead", {}, make("tr", {}, ...headers.map((text, at) => make("th", { scope: "col", textContent: text, className: at ? "" : "text" })))),
      make("tbody", {}, ...points.map((point) => make("tr", {}, ...cells([point.name, magnitude(point.cost) + point.mark, told(point), point.best ? "yes" : "no"])))),
    );
    const wasOpen = figure.querySelector("details")?.open || false;
    const details = make("details", { open: wasOpen }, make("summary", { textContent: "The plot as a table" }), table);
    figure.replaceChildren(picture, tip, make("figcaption", { textContent: words }), details);
  };
  const drawAll = () => sections.filter((section) => !section.hidden).forEach(draw);
  let drawnWidth = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== drawnWidth) { drawnWidth = innerWidth; drawAll(); }
  });

  form.hidden = false;
  readAddress();
  apply();
})();
