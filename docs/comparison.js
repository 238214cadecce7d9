// Makes the tables of compare.md sortable and filterable: a menu for each column marked data-filter, one for those marked
// data-group, of which it shows all or one, but none that is empty in the chosen rows. A heading sorts by a click, or by
// Enter or Space. Without it the tables stand as they are.

for (const table of document.querySelectorAll("table[data-comparison]")) {
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...table.tBodies[0].rows];
  const chosen = new Map(); // by column, the value that a row must have
  const menus = document.createElement("p");
  const count = document.createElement("span");

  const number = (text) => parseFloat(text.replace(/,/g, "").replace("\u2212", "-"));
  const compare = (a, b) => {
    const [x, y] = [number(a), number(b)];
    if (!isNaN(x) && !isNaN(y)) return x - y;
    return a.localeCompare(b);
  };
  const text = (row, column) => row.cells[column].textContent;

  const group = heads.flatMap((head, column) => ("group" in head.dataset ? [column] : []));
  let groupMenu = null;

  const showGroup = () => {
    const empty = (column) => rows.every((row) => row.hidden || text(row, column) === "");
    for (const option of groupMenu?.options ?? []) option.disabled = option.value !== "" && empty(+option.dataset.column);
    if (groupMenu?.selectedOptions[0].disabled) groupMenu.value = "";
    for (const column of group) {
      const hidden = groupMenu.value === "" ? empty(column) : heads[column].textContent !== groupMenu.value;
      for (const row of [table.tHead.rows[0], ...rows]) row.cells[column].hidden = hidden;
    }
  };

  const filter = () => {
    for (const row of rows) row.hidden = ![...chosen].every(([column, value]) => text(row, column) === value);
    showGroup();
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };

  const isOfWords = (column) => ["method", "prunes", "test set", "questions about", "against", "at equal"].includes(heads[column].textContent);

  const sort = (column, rising) => {
    // always last: what is empty, or says in words why there is no figure
    const empty = (row) => text(row, column) === "" || (!isOfWords(column) && isNaN(number(text(row, column))));
    rows.sort((a, b) => empty(a) - empty(b) || (rising ? 1 : -1) * compare(text(a, column), text(b, column)));
    for (const head of heads) head.removeAttribute("aria-sort");
    heads[column].setAttribute("aria-sort", rising ? "ascending" : "descending");
    table.tBodies[0].append(...rows);
  };

  const menu = (name, values, change) => {
    const label = document.createElement("label");
    const select = document.createElement("select");
    select.append(new Option("all", ""), ...values.map((value) => new Option(value, value)));
    select.onchange = () => change(select.value);
    select.setAttribute("aria-label", name);
    label.append(`${name} `, select, " ");
    menus.append(label);
    return select;
  };

  heads.forEach((head, column) => {
    head.style.cursor = "pointer";
    head.title = "sort";
    head.tabIndex = 0;
    head.onclick = () => {
      const before = head.getAttribute("aria-sort");
      sort(column, before === null ? isOfWords(column) : before === "descending"); // figures begin with the highest
    };
    head.onkeydown = (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault(); // a space would scroll the page
      head.click();
    };
    if ("filter" in head.dataset) {
      const values = [...new Set(rows.map((row) => text(row, column)))].sort(compare);
      menu(head.textContent, values, (value) => {
        value ? chosen.set(column, value) : chosen.delete(column);
        filter();
      });
    }
  });

  if (group.length) {
    groupMenu = menu(table.dataset.groupName, group.map((column) => heads[column].textContent), (value) => {
      showGroup();
      if (value !== "") sort(group.find((column) => heads[column].textContent === value), false);
    });
    group.forEach((column, place) => (groupMenu.options[place + 1].dataset.column = column));
  }

  menus.append(count);
  (table.closest(".md-typeset__scrollwrap") ?? table).before(menus);
  filter();
}
