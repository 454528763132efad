// A link of a chosen one-way delay and rate between two network namespaces, for kernels without netem.
//
//     delay_line NETNS_A DEVICE_A NETNS_B DEVICE_B
//
// Makes a TUN device in each namespace (/run/netns/NAME) and carries packets from one to the other. Commands
// come on standard input, a line each: "DELAY_US RATE_MBIT LOSE_A LOSE_B" (rate 0: unlimited; 1 loses what comes
// from that side), answered by "ok" once in force. Ends when standard input ends, so it never outlives who
// started it.
//
// A packet leaves the queue of its direction when it has been sent at the rate (behind those before it) and
// then travelled for the delay: what netem does with `delay` and `rate`.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { QUEUE = 1 << 16, LARGEST_PACKET = 1 << 16, BURST = 64, RETRY_NS = 20000, REAL_TIME_PRIORITY = 50 };

struct packet {
    uint64_t due_ns;
    size_t size;
    char *bytes;
};

struct direction {
    int from, to;
    int loses;               // every packet
    uint64_t busy_until_ns;  // the sender's side of the link is taken until then
    unsigned head, tail;     // of the ring, both counting up
    struct packet *ring;
};

static uint64_t delay_ns;
static double rate_mbit;
static struct direction ways[2];

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static int open_device(const char *namespace, const char *name) {
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", namespace);
    int handle = open(path, O_RDONLY | O_CLOEXEC);
    if (handle < 0 || setns(handle, 0) < 0) fail(path);
    close(handle);
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (device < 0) fail("/dev/net/tun");
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    if (ioctl(device, TUNSETIFF, &request) < 0) fail(name);
    return device;
}

static void take_in(struct direction *way) {
    static char bytes[LARGEST_PACKET];
    for (int taken = 0; taken < BURST; taken++) {
        ssize_t size = read(way->from, bytes, sizeof bytes);
        if (size <= 0 || way->tail - way->head == QUEUE) return;  // a full queue drops, as a router's does
        if (way->loses) continue;
        uint64_t arrived = now_ns();
        uint64_t start = way->busy_until_ns > arrived ? way->busy_until_ns : arrived;
        way->busy_until_ns = start + (rate_mbit > 0 ? (uint64_t)((double)size * 8e3 / rate_mbit) : 0);
        struct packet *packet = &way->ring[way->tail++ % QUEUE];
        *packet = (struct packet){way->busy_until_ns + delay_ns, (size_t)size, malloc((size_t)size)};
        if (!packet->bytes) fail("malloc");
        memcpy(packet->bytes, bytes, packet->size);
    }
}

// Delivers what is due; returns when the next packet will be, UINT64_MAX without one.
static uint64_t deliver(struct direction *way) {
    while (way->head != way->tail) {
        struct packet *packet = &way->ring[way->head % QUEUE];
        uint64_t now = now_ns();
        if (packet->due_ns > now) return packet->due_ns;
        if (write(way->to, packet->bytes, packet->size) < 0 && errno == EAGAIN) return now + RETRY_NS;
        free(packet->bytes);
        way->head++;
    }
    return UINT64_MAX;
}

// Takes a command line; returns 0 at the end of standard input.
static int obey(void) {
    char line[128];
    double delay_us, rate;
    int lose_a, lose_b;
    ssize_t size = read(STDIN_FILENO, line, sizeof line - 1);
    if (size <= 0) return 0;
    line[size] = 0;
    if (sscanf(line, "%lf %lf %d %d", &delay_us, &rate, &lose_a, &lose_b) != 4) {
        puts("expected: DELAY_US RATE_MBIT LOSE_A LOSE_B");
    } else {
        delay_ns = (uint64_t)(delay_us * 1e3);
        rate_mbit = rate;
        ways[0].loses = lose_a;
        ways[1].loses = lose_b;
        puts("ok");
    }
    fflush(stdout);
    return 1;
}

int main(int count, char **arguments) {
    if (count != 5) {
        fprintf(stderr, "usage: delay_line NETNS_A DEVICE_A NETNS_B DEVICE_B\n");
        return 2;
    }
    int a = open_device(arguments[1], arguments[2]), b = open_device(arguments[3], arguments[4]);
    ways[0] = (struct direction){.from = a, .to = b};
    ways[1] = (struct direction){.from = b, .to = a};
    for (int i = 0; i < 2; i++)
        if (!(ways[i].ring = calloc(QUEUE, sizeof(struct packet)))) fail("calloc");
    struct sched_param priority = {.sched_priority = REAL_TIME_PRIORITY};
    if (sched_setscheduler(0, SCHED_FIFO, &priority) < 0) perror("real-time priority");  // goes on without
    prctl(PR_SET_TIMERSLACK, 1);
    puts("ready");
    fflush(stdout);
    for (;;) {
        uint64_t next = UINT64_MAX;
        for (int i = 0; i < 2; i++) {
            take_in(&ways[i]);
            uint64_t due = deliver(&ways[i]);
            if (due < next) next = due;
        }
        uint64_t now = now_ns(), wait = next > now ? next - now : 0;
        struct timespec limit = {(time_t)(wait / 1000000000u), (long)(wait % 1000000000u)};
        struct pollfd ready[3] = {{a, POLLIN, 0}, {b, POLLIN, 0}, {STDIN_FILENO, POLLIN, 0}};
        ppoll(ready, 3, next == UINT64_MAX ? NULL : &limit, NULL);
        if (ready[2].revents && !obey()) return 0;
    }
}
