"""Time zones that both locales of a pair name, without the machine's time zone tables."""

import datetime

from babel.core import get_global

from common.data.built_in.cldr_pair import LocalePair

ZONES_PER_COMMON_METAZONE = 10
"""Names of time zones come from CLDR's metazones that at least this many zones share."""


class Zone(datetime.tzinfo):
    """A time zone that babel can name without the machine's time zone tables, whose versions differ."""

    def __init__(self, key: str, summer: bool):
        self.key, self._summer = key, datetime.timedelta(hours=summer)

    def utcoffset(self, moment: datetime.datetime | None) -> datetime.timedelta:
        return self._summer

    def dst(self, moment: datetime.datetime | None) -> datetime.timedelta:
        return self._summer

    def tzname(self, moment: datetime.datetime | None) -> str:
        return self.key


def common_zones(pair: LocalePair) -> list[Zone]:
    """Returns standard and summer time of the metazones that many zones share and both locales name; else UTC."""
    members: dict[str, list[str]] = {}
    for key, metazone in sorted(get_global("meta_zones").items()):
        members.setdefault(metazone, []).append(key)

    def named(metazone: str, variant: str) -> bool:
        return all(variant in locale.meta_zones.get(metazone, {}).get("long", {}) for locale in pair.locales)

    return [
        Zone(keys[0], summer=variant == "daylight")
        for metazone, keys in sorted(members.items())
        if len(keys) >= ZONES_PER_COMMON_METAZONE
        for variant in ("standard", "daylight")
        if named(metazone, variant)
    ] or [Zone("Etc/UTC", summer=False)]
