# Shared by apps/quickstart and tests/run (sourced, not run): the Debian packages Troupe needs, and
# functions that install, configure and build only what is missing. Nothing here reads stdin.
#
# Expects `set -euo pipefail` and $root, the folder of the checkout.

# What cmake/dependencies.cmake asks for, and the tools to build with.
build_packages=(
  g++ cmake ninja-build pkg-config
  libcaf-dev libssl-dev libprotobuf-dev protobuf-compiler
  libboost1.81-dev libboost-json1.81-dev libucx-dev libcli11-dev libfmt-dev libspdlog-dev
  libhwy-dev libpcre2-dev libxxhash-dev doctest-dev
)
# On top, for the tests: clang for libFuzzer, ip and mpirun for launching, openssl for certificates,
# oneDNN as the benchmarks' peer, ccache because branches and sanitizers build the same sources again
# and again.
test_packages=(clang-16 libclang-rt-16-dev iproute2 openmpi-bin openssl libdnnl-dev ccache)

say() { printf '%s\n' "$*"; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# Prints those of the given packages that are not installed.
missing_packages() {
  local package
  for package in "$@"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
      printf '%s\n' "$package"
  done
}

# Runs a command as root, through sudo where we are not. Without a terminal sudo must not ask.
as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif [ -t 2 ] && [ -r /dev/tty ]; then
    sudo -- "$@"
  else
    sudo -n -- "$@"
  fi
}

# Installs the packages that are missing, and says which. Sets installed_something.
installed_something=no
install_packages() {
  if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    say "This system has no apt. Troupe is built from these Debian 12 packages, or their likes:"
    say "  $*"
    say "Going on with what is here; CMake names what it cannot find."
    return
  fi
  local missing
  mapfile -t missing < <(missing_packages "$@")
  [ ${#missing[@]} -gt 0 ] || return 0
  say "Installing ${#missing[@]} Debian packages: ${missing[*]}"
  local by_hand="apt-get update && apt-get install --no-install-recommends ${missing[*]}"
  if [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null; then
    die "installing needs root, and there is no sudo; run as root: $by_hand"
  fi
  # An update can fail for one bad mirror while the rest suffices, so the installation decides.
  as_root apt-get update -q </dev/null ||
    say "apt-get update failed (offline, or no rights?); trying with the lists that are here"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
    "${missing[@]}" </dev/null ||
    die "the packages could not be installed (is this machine online, and Debian 12?); by hand: $by_hand"
  installed_something=yes
}

# How many compilers may run: one for each core, and 1.5 GB of free memory for each.
build_jobs() {
  local cores memory_kb jobs
  cores=$(nproc)
  memory_kb=$(awk '/^MemAvailable:/ { print $2 }' /proc/meminfo)
  jobs=$((${memory_kb:-1500000} / 1500000))
  ((jobs < cores)) || jobs=$cores
  ((jobs > 0)) || jobs=1
  echo "$jobs"
}

# configure PRESET: unless that is done and neither presets nor packages have changed since.
configure() {
  local ninja_file=$root/build/$1/build.ninja
  if [ -e "$ninja_file" ] && [ "$installed_something" = no ] &&
    ! [ "$root/CMakePresets.json" -nt "$ninja_file" ]; then
    return
  fi
  say "Configuring build/$1"
  (cd "$root" && cmake --preset "$1" </dev/null) || die "configuring build/$1 failed"
}

# build PRESET [TARGET...]: without targets everything. Ninja does what has changed and says so.
build() {
  local preset=$1
  shift
  configure "$preset"
  local targets=("$@") jobs
  [ $# -gt 0 ] || targets=(all)
  jobs=$(build_jobs)
  say "Building what has changed in build/$preset (${targets[*]}, $jobs at a time)"
  NINJA_STATUS='[%f/%t, %es] ' ninja -C "$root/build/$preset" -j "$jobs" "${targets[@]}" </dev/null ||
    die "building build/$preset failed"
}
