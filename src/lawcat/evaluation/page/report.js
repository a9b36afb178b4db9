"use strict";
// The page is whole without this: it adds a filter over the failed samples and sorting of tables.
(() => {
  const form = document.getElementById("filter");
  if (form) {
    const fields = [...form.querySelectorAll("select")];
    const show = () => {
      let samples = 0;
      for (const task of document.querySelectorAll(".failed-task")) {
        let open = 0;
        for (const group of task.querySelectorAll(".failed-cell")) {
          group.hidden = fields.some(({ name, value }) => value !== "" && group.dataset[name] !== value);
          open += group.hidden ? 0 : Number(group.dataset.count);
        }
        task.hidden = open === 0;
        task.open = open > 0 && (task.open || fields.some(({ value }) => value !== ""));
        samples += open;
      }
      form.querySelector("output").value = `${samples.toLocaleString("en")} samples on this page`;
    };
    form.addEventListener("change", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    show();
  }
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
        // Rows without a value stay last, whichever way.
        const order = (a, b) => {
          const [left, right] = [value(a), value(b)];
          if (left === "" || right === "") return (left === "") - (right === "");
          const difference = Number(left) - Number(right);
          const result = Number.isNaN(difference) ? left.localeCompare(right) : difference;
          return up ? result : -result;
        };
        body.append(...[...body.rows].sort(order));
      });
    });
  }
})();
