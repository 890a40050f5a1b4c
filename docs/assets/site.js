renderMathInElement(document.body, {
  delimiters: [{ left: "\\[", right: "\\]", display: true }, { left: "\\(", right: "\\)", display: false }],
  throwOnError: true,
});

// An option is searched by its name: to the search a word behind "-" is one that must not be there.
for (const kind of ["input", "keyup"]) document.addEventListener(kind, ({ target }) => {
  if (!target.matches(".md-search__input")) return;
  const plain = target.value.replace(/(^|\s)-+(?=\w)/g, "$1");
  if (plain !== target.value) target.value = plain;
}, true);
