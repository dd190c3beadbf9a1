"""specjax inside other libraries' own interfaces; each module needs the library that it is named after."""
