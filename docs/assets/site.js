renderMathInElement(document.body, {
  delimiters: [{ left: "\\[", right: "\\]", display: true }, { left: "\\(", right: "\\)", display: false }],
  throwOnError: true,
});

// An option is searched by its name: the search takes a word after "-" as one that must not occur.
for (const kind of ["input", "keyup"]) document.addEventListener(kind, ({ target }) => {
  if (!target.matches(".md-search__input")) return;
  const plain = target.value.replace(/(^|\s)-+(?=\w)/g, "$1");
  if (plain !== target.value) target.value = plain;
}, true);

// A name whose reference moved to another page, or from a page that no longer exists (then this runs in 404.html).
const anchor = decodeURIComponent(location.hash.slice(1));
if (Object.hasOwn(pagesOf, anchor) && !document.getElementById(anchor)) {
  const former = location.pathname.split("/").pop().replace(".html", "");
  const page = pagesOf[anchor].find(page => page.startsWith(former)) ?? pagesOf[anchor][0];
  location.replace(new URL(`../${page}#${anchor}`, document.querySelector("script[src$='assets/names.js']").src));
}
