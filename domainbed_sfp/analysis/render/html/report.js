"use strict";
// Without scripts every figure is shown; with them, one of each group at a time.
for (const group of document.querySelectorAll(".figures")) {
  const select = group.querySelector("select");
  if (!select) continue;
  const figures = [...group.querySelectorAll("figure")];
  const show = () => figures.forEach((figure, at) => { figure.classList.toggle("aside", at !== select.selectedIndex); });
  select.parentElement.hidden = false;
  select.addEventListener("change", show);
  show();
}
