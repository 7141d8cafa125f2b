#!/bin/sh
# Installs what building and testing need and what is missing: Python, a PostgreSQL server with plpython3u,
# and .venv with the project's dependencies. Creates, starts and stops no cluster. Quick when all is there.
set -eu
umask 022
cd "$(dirname "$0")/.."

# Two runs at once would write the same .venv.
if [ "${PG_BACKGROUND_BOOTSTRAP_LOCKED:-}" != 1 ] && command -v flock >/dev/null; then
    PG_BACKGROUND_BOOTSTRAP_LOCKED=1 exec flock .bootstrap.lock sh tools/bootstrap.sh "$@"
fi

python=/usr/bin/python3

say() { echo "bootstrap: $*"; }
die() { echo "bootstrap: $*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "needs root (or sudo) to run: $*"
    fi
}

has_plpython() {
    if [ -n "${PG_CONFIG:-}" ]; then
        [ -e "$("$PG_CONFIG" --pkglibdir)/plpython3.so" ]
        return
    fi
    for library in /usr/lib/postgresql/*/lib/plpython3.so /usr/pgsql-*/lib/plpython3.so \
                   /usr/lib64/pgsql/plpython3.so; do
        [ -e "$library" ] && return
    done
    return 1
}

# Major versions of the installed servers, the newest first; then the one that Debian takes by itself.
majors() {
    if [ -n "${PG_CONFIG:-}" ]; then
        "$PG_CONFIG" --version | sed -E 's/^PostgreSQL ([0-9]+).*/\1/'
        return
    fi
    for server in /usr/lib/postgresql/*/bin/postgres; do
        [ -x "$server" ] || continue
        basename "${server%/bin/postgres}"
    done | sort -rn
    apt-cache depends --important postgresql 2>/dev/null | sed -nE 's/.*Depends: postgresql-([0-9]+)$/\1/p'
}

plpython_package() {
    for major in $(majors); do
        package="postgresql-plpython3-$major"
        if apt-cache show "$package" >/dev/null 2>&1; then
            echo "$package"
            return
        fi
    done
    die "no postgresql-plpython3-NN package for the servers here ($(majors | tr '\n' ' '))"
}

made=''
cleanup() {
    for file in $made; do as_root rm -f "$file"; done
    made=''
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Debian's server packages create and start a cluster when they are installed: not for this.
forbid_clusters() {
    conf=/etc/postgresql-common/createcluster.d/pg_background_bootstrap.conf
    as_root mkdir -p "${conf%/*}"
    made="$conf"
    echo 'create_main_cluster = false' | as_root tee "$conf" >/dev/null
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        made="$made $policy"
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
    fi
}

install_packages() {
    command -v apt-get >/dev/null ||
        die "no apt-get here: install python3 with venv and pip, and a PostgreSQL server with plpython3u"
    say "apt-get update"
    as_root apt-get update -qq
    packages=''
    [ -x "$python" ] || packages="$packages python3"
    [ "$need_venv" = 0 ] || packages="$packages python3-venv"
    if [ "$need_server" = 1 ]; then
        package="$(plpython_package)"
        packages="$packages $package"
    fi
    say "installs$packages (and what they need; running clusters are not restarted)"
    forbid_clusters
    # shellcheck disable=SC2086 # a list of words
    if ! as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get install -qq -y --no-install-recommends $packages >.bootstrap.log 2>&1; then
        cat .bootstrap.log >&2
        die "apt-get install failed, as shown above"
    fi
    cleanup
}

need_venv=0
need_server=0
"$python" -c 'import venv, ensurepip' 2>/dev/null || need_venv=1
has_plpython || need_server=1
if [ "$need_venv$need_server" != 00 ]; then
    install_packages
fi

# The stamp holds what .venv was made from.
stamp=.venv/bootstrap.stamp
wanted="$("$python" -V) $(cksum <pyproject.toml)"
if [ -x .venv/bin/python ] && [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
say "makes .venv ($("$python" -V))"
rm -f "$stamp"
.venv/bin/python -c '' 2>/dev/null || rm -rf .venv
[ -e .venv ] || "$python" -m venv .venv
.venv/bin/python - <<'EOF' >.venv/requirements.txt
try:
    import tomllib
except ImportError:  # Python 3.10 and older
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print("\n".join(project["dependencies"] + project["optional-dependencies"]["dev"]))
EOF
.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement .venv/requirements.txt
echo "$wanted" >"$stamp"
